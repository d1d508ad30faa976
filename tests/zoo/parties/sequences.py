"""Sequences: text, sound, speech, time series, brain signals, state spaces."""

from __future__ import annotations

import torch

from zoo.parties.recipe import Recipe, ids, image, noise, recipe, several, tokens


def _x(name: str, inputs: object, layers: Recipe, **kwargs: object) -> Recipe:
    return recipe(f"x_transformers:{name}", inputs, attn_layers=layers, **kwargs)  # type: ignore[arg-type]


def _layers(name: str = "Decoder", **kwargs: object) -> Recipe:
    return recipe(
        f"x_transformers:{name}",
        noise(1),
        **({"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16} | kwargs),
    )


def _gpt(**kwargs: object) -> Recipe:
    return _x("TransformerWrapper", ids(2, 8), _layers(**kwargs), num_tokens=32, max_seq_len=16)


X_TRANSFORMERS = {
    "decoder": _gpt(),
    "encoder": _x("TransformerWrapper", ids(2, 8), _layers("Encoder"), num_tokens=32, max_seq_len=16),
    "rotary_rmsnorm": _gpt(rotary_pos_emb=True, use_rmsnorm=True),
    "alibi": _gpt(alibi_pos_bias=True, alibi_num_heads=2),
    "swiglu": _gpt(ff_glu=True, ff_swish=True, ff_no_bias=True),
    "relu_squared": _gpt(ff_relu_squared=True),
    "qk_norm": _gpt(attn_qk_norm=True),
    "multi_query": _gpt(attn_one_kv_head=True),
    "sandwich_norm": _gpt(sandwich_norm=True),
    "gated_residual": _gpt(gate_residual=True),
    "talking_heads": _gpt(attn_pre_talking_heads=True),
    "macaron": _gpt(macaron=True),
    "memory_kv": _gpt(attn_num_mem_kv=4),
    "scale_residual": _gpt(scale_residual=True),
    "sparse_topk": _gpt(attn_sparse_topk=4),
    "dynamic_pos_bias": _gpt(dynamic_pos_bias=True, dynamic_pos_bias_log_distance=False),
    "relative_bias": _gpt(rel_pos_bias=True),
    "residual_attention": _gpt(residual_attn=True),
    "value_gate": _gpt(attn_gate_values=True),
    "shift_tokens": _gpt(shift_tokens=1),
    "vit": _x("ViTransformerWrapper", image(32), _layers("Encoder"), image_size=32, patch_size=8, num_classes=10),
    "continuous": _x("ContinuousTransformerWrapper", noise(2, 8, 6), _layers(), dim_in=6, dim_out=4, max_seq_len=16),
}  # fmt: skip

LUCIDRAINS = {
    "performer-pytorch:performer": recipe("performer_pytorch:Performer", noise(1, 8, 32), dim=32, depth=1, heads=2, dim_head=16, causal=False),
    "performer-pytorch:lm": recipe("performer_pytorch:PerformerLM", ids(1, 8), num_tokens=32, max_seq_len=16, dim=32, depth=1, heads=2, dim_head=16),
    "linformer:linformer": recipe("linformer:Linformer", noise(2, 16, 32), dim=32, seq_len=16, depth=2, heads=2, k=8),
    "reformer-pytorch:lm": recipe("reformer_pytorch:ReformerLM", ids(1, 32), num_tokens=32, dim=32, depth=1, max_seq_len=32, heads=2, bucket_size=8, n_hashes=2),
    "perceiver-pytorch:perceiver": recipe("perceiver_pytorch:Perceiver", noise(1, 8, 8, 3), input_channels=3, input_axis=2, num_freq_bands=3, max_freq=4.0, depth=2, num_latents=8, latent_dim=16, cross_heads=1, latent_heads=2, cross_dim_head=8, latent_dim_head=8, num_classes=5),
    "perceiver-pytorch:io": recipe("perceiver_pytorch:PerceiverIO", noise(1, 8, 16), depth=1, dim=16, queries_dim=16, logits_dim=None, num_latents=8, latent_dim=16, cross_heads=1, latent_heads=2, cross_dim_head=8, latent_dim_head=8),
    "conformer:block": recipe("conformer:ConformerBlock", noise(2, 16, 32), dim=32, dim_head=16, heads=2, ff_mult=2, conv_kernel_size=7),
    "conformer:conformer": recipe("conformer:Conformer", noise(2, 16, 32), dim=32, depth=1, dim_head=16, heads=2, ff_mult=2, conv_kernel_size=7),
    "mlp-mixer-pytorch:mixer": recipe("mlp_mixer_pytorch:MLPMixer", image(32), image_size=32, channels=3, patch_size=8, dim=32, depth=2, num_classes=10),
    "g-mlp-pytorch:gmlp": recipe("g_mlp_pytorch:gMLP", ids(2, 16), num_tokens=32, dim=32, depth=2, seq_len=16),
    "g-mlp-pytorch:vision": recipe("g_mlp_pytorch:gMLPVision", image(32), image_size=32, patch_size=8, num_classes=10, dim=32, depth=2),
    "res-mlp-pytorch:resmlp": recipe("res_mlp_pytorch:ResMLP", image(32), image_size=32, patch_size=8, dim=32, depth=2, num_classes=10),
    "siren-pytorch:siren": recipe("siren_pytorch:SirenNet", noise(4, 2), dim_in=2, dim_hidden=16, dim_out=3, num_layers=2),
    "egnn-pytorch:egnn": recipe("egnn_pytorch:EGNN", several((1, 6, 16), (1, 6, 3)), dim=16),
    "egnn-pytorch:network": recipe("egnn_pytorch:EGNN_Network", lambda: (tokens(1, 6, below=8), torch.randn(1, 6, 3)), num_tokens=8, dim=16, depth=2),
    "point-transformer-pytorch:layer": recipe("point_transformer_pytorch:PointTransformerLayer", several((1, 8, 16), (1, 8, 3)), dim=16, pos_mlp_hidden_dim=8, attn_mlp_hidden_mult=2),
    "tab-transformer-pytorch:tab": recipe("tab_transformer_pytorch:TabTransformer", lambda: (tokens(2, 3, below=4), torch.randn(2, 4)), mlp_act=torch.nn.ReLU(), categories=(5, 5, 5), num_continuous=4, dim=16, dim_out=1, depth=1, heads=2),
    "tab-transformer-pytorch:ft": recipe("tab_transformer_pytorch:FTTransformer", lambda: (tokens(2, 3, below=4), torch.randn(2, 4)), categories=(5, 5, 5), num_continuous=4, dim=16, dim_out=1, depth=1, heads=2),
    "lambda-networks:layer": recipe("lambda_networks:LambdaLayer", image(8, 16), dim=16, dim_out=16, r=3, dim_k=8, heads=2, dim_u=1),
    "bottleneck-transformer-pytorch:stack": recipe("bottleneck_transformer_pytorch:BottleStack", image(8, 16), dim=16, fmap_size=8, dim_out=32, heads=2, dim_head=8, num_layers=2, downsample=False),
    "timesformer-pytorch:timesformer": recipe("timesformer_pytorch:TimeSformer", noise(1, 2, 3, 16, 16), dim=32, image_size=16, patch_size=8, num_frames=2, num_classes=5, depth=1, heads=2, dim_head=16),
    "axial-attention:transformer": recipe("axial_attention:AxialImageTransformer", image(8, 16, 1), dim=16, depth=1, reversible=False),
    "axial-attention:attention": recipe("axial_attention:AxialAttention", image(8, 16), dim=16, dim_index=1, heads=2, num_dimensions=2),
    "local-attention:transformer": recipe("local_attention.transformer:LocalTransformer", ids(2, 16), num_tokens=32, max_seq_len=16, dim=32, depth=1, heads=2, dim_head=16, local_attn_window_size=8),
    "vector-quantize-pytorch:vq": recipe("vector_quantize_pytorch:VectorQuantize", noise(2, 8, 16), dim=16, codebook_size=8),
    "vector-quantize-pytorch:fsq": recipe("vector_quantize_pytorch:FSQ", noise(2, 8, 16), [4, 4, 3], dim=16),
    "vector-quantize-pytorch:lfq": recipe("vector_quantize_pytorch:LFQ", noise(2, 8, 16), codebook_size=16, dim=16),
    "nystrom-attention:nystromformer": recipe("nystrom_attention:Nystromformer", noise(1, 16, 32), dim=32, dim_head=16, heads=2, depth=1, num_landmarks=4, pinv_iterations=3),
    "slot-attention:slots": recipe("slot_attention:SlotAttention", noise(2, 8, 16), num_slots=3, dim=16, iters=2),
    "hyper-connections:residual": recipe("hyper_connections:Residual", noise(2, 4, 16)),
    "itransformer:itransformer": recipe("iTransformer:iTransformer", noise(2, 12, 5), num_variates=5, lookback_len=12, dim=16, depth=1, heads=2, dim_head=8, pred_length=4, num_tokens_per_variate=1),
    "mingru-pytorch:mingru": recipe("minGRU_pytorch:minGRU", noise(2, 8, 16), dim=16, expansion_factor=1.5),
    "mingru-pytorch:lm": recipe("minGRU_pytorch.minLM:minLM", ids(2, 8), num_tokens=32, dim=16, depth=2),
    "enformer-pytorch:enformer": recipe("enformer_pytorch:Enformer.from_hparams", lambda: torch.randint(0, 4, (1, 1024)), dim=48, depth=1, heads=2, target_length=4, num_downsamples=3, dim_divisible_by=8, output_heads={"human": 4}),
    "bs-roformer:bs": recipe("bs_roformer:BSRoformer", noise(1, 2048), dim=16, depth=1, time_transformer_depth=1, freq_transformer_depth=1, heads=2, dim_head=8, stft_n_fft=256, stft_hop_length=64, stft_win_length=256, freqs_per_bands=(1,) * 65 + (2,) * 32, flash_attn=False),
    "linear-attention-transformer:lm": recipe("linear_attention_transformer:LinearAttentionTransformerLM", ids(1, 16), num_tokens=32, dim=32, heads=2, depth=1, max_seq_len=16),
    "product-key-memory:pkm": recipe("product_key_memory:PKM", noise(1, 4, 32), dim=32, heads=2, dim_head=8, num_keys=8, topk=4),
    "soft-moe-pytorch:softmoe": recipe("soft_moe_pytorch:SoftMoE", noise(1, 8, 16), dim=16, seq_len=8, num_experts=4),
    "st-moe-pytorch:moe": recipe("st_moe_pytorch:MoE", noise(1, 8, 16), dim=16, num_experts=4, gating_top_n=2),
    "colt5-attention:conditional_ff": recipe("colt5_attention:ConditionalRoutedFeedForward", noise(1, 16, 16), dim=16, light_ff_mult=0.5, heavy_ff_mult=2, num_heavy_tokens=4),
    "uformer-pytorch:uformer": recipe("uformer_pytorch:Uformer", image(32, batch=1), dim=8, stages=2, num_blocks=1, window_size=8, dim_head=8, heads=2, ff_mult=2),
    "halonet-pytorch:halo": recipe("halonet_pytorch:HaloAttention", image(8, 16), dim=16, block_size=4, halo_size=2, dim_head=8, heads=2),
    "involution-pytorch:involution": recipe("involution_pytorch:Inv2d", image(8, 16), 16, 3, 1),
    "glom-pytorch:glom": recipe("glom_pytorch:Glom", image(16, batch=1), dim=16, levels=3, image_size=16, patch_size=8),
    "segformer-pytorch:segformer": recipe("segformer_pytorch:Segformer", image(64, batch=1), dims=(8, 16, 16, 32), heads=(1, 2, 2, 2), ff_expansion=(2, 2, 2, 2), reduction_ratio=(8, 4, 2, 1), num_layers=1, decoder_dim=16, num_classes=4),
    "mega-pytorch:mega": recipe("mega_pytorch:Mega", ids(1, 16), num_tokens=32, dim=16, depth=1, ema_heads=4, attn_dim_qk=8, attn_dim_value=16, laplacian_attn_fn=True),
    "charformer-pytorch:gbst": recipe("charformer_pytorch:GBST", ids(1, 16), num_tokens=32, dim=16, max_block_size=4, downsample_factor=4, score_consensus_attn=True),
    "memory-efficient-attention-pytorch:attention": recipe("memory_efficient_attention_pytorch:Attention", noise(1, 16, 16), dim=16, dim_head=8, heads=2, memory_efficient=False),
    "titans-pytorch:mac": recipe("titans_pytorch:MemoryAsContextTransformer", ids(1, 16), num_tokens=32, dim=16, depth=1, segment_len=8, num_persist_mem_tokens=2, num_longterm_mem_tokens=2),
    "h-transformer-1d:h": recipe("h_transformer_1d:HTransformer1D", ids(1, 32), num_tokens=32, dim=16, depth=1, max_seq_len=32, heads=2, dim_head=8, block_size=8, causal=False),
}  # fmt: skip

_AUDIO = {"n_filters": 16, "kernel_size": 8, "stride": 4}
SOUND = {
    "asteroid:convtasnet": recipe("asteroid.models:ConvTasNet", noise(1, 400), n_src=2, out_chan=16, n_blocks=2, n_repeats=1, bn_chan=8, hid_chan=16, skip_chan=8, **_AUDIO),
    "asteroid:dprnn": recipe("asteroid.models:DPRNNTasNet", noise(1, 400), n_src=2, out_chan=16, bn_chan=8, hid_size=8, chunk_size=10, hop_size=5, n_repeats=1, **_AUDIO),
    "asteroid:dptnet": recipe("asteroid.models:DPTNet", noise(1, 400), n_src=2, n_heads=2, ff_hid=8, chunk_size=10, hop_size=5, n_repeats=1, **_AUDIO),
    "asteroid:sudormrf": recipe("asteroid.models:SuDORMRFNet", noise(1, 400), n_src=2, bn_chan=8, num_blocks=1, upsampling_depth=2, kernel_size=8, n_filters=16, stride=4),
    "asteroid:lstmtasnet": recipe("asteroid.models:LSTMTasNet", noise(1, 400), n_src=2, hid_size=8, n_layers=1, n_filters=16, kernel_size=8, stride=4),
    "asteroid:demask": recipe("asteroid.models:DeMask", noise(1, 800), hidden_dims=(16,), n_filters=32, kernel_size=32, stride=16),
    "speechbrain:ecapa": recipe("speechbrain.lobes.models.ECAPA_TDNN:ECAPA_TDNN", noise(2, 30, 8), 8, lin_neurons=8, channels=[8, 8, 8, 8, 24], attention_channels=8, res2net_scale=2, se_channels=8),
    "speechbrain:xvector": recipe("speechbrain.lobes.models.Xvector:Xvector", noise(2, 30, 8), in_channels=8, tdnn_blocks=3, tdnn_channels=[8, 8, 16], tdnn_kernel_sizes=[3, 3, 1], tdnn_dilations=[1, 2, 1], lin_neurons=8),
    "speechbrain:crdnn": recipe("speechbrain.lobes.models.CRDNN:CRDNN", noise(2, 16, 8), input_size=8, cnn_blocks=1, cnn_channels=(8,), rnn_layers=1, rnn_neurons=8, dnn_blocks=1, dnn_neurons=8, time_pooling=True),
    "speechbrain:vanilla": recipe("speechbrain.lobes.models.VanillaNN:VanillaNN", noise(2, 5, 8), input_shape=[2, 5, 8], dnn_blocks=2, dnn_neurons=8),
    "speechbrain:contextnet": recipe("speechbrain.lobes.models.ContextNet:ContextNet", noise(2, 32, 8), input_shape=[2, 32, 8], out_channels=8, conv_channels=[8, 8], kernel_size=3, strides=[1, 2], num_blocks=2, num_layers=2, inner_dim=4, alpha=1.0),
    "speechbrain:hifigan": recipe("speechbrain.lobes.models.HifiGAN:HifiganGenerator", noise(1, 8, 10), 8, 1, "1", [[1, 3], [1, 3]], [3, 3], [4, 4], 16, [2, 2], inference_padding=0),
    "speechbrain:enhance_resnet": recipe("speechbrain.lobes.models.EnhanceResnet:EnhanceResnet", noise(1, 512), channel_counts=[4, 4], dense_count=1, dense_nodes=8, n_fft=64, hop_length=16),
    "speechbrain:metricgan": recipe("speechbrain.lobes.models.MetricGAN:EnhancementGenerator", lambda: (torch.rand(2, 10, 16), torch.ones(2)), input_size=16, hidden_size=8, num_layers=1),
    "speechbrain:conv_tasnet_mask": recipe("speechbrain.lobes.models.conv_tasnet:MaskNet", noise(1, 8, 20), 8, 8, 8, 3, 2, 1, 2),
    "speechbrain:resnet": recipe("speechbrain.lobes.models.ResNet:ResNet", noise(2, 30, 16), input_size=16, channels=[8, 8, 8, 8], block_sizes=[1, 1, 1, 1], lin_neurons=8),
    "encodec:encoder": recipe("encodec.modules:SEANetEncoder", noise(1, 1, 640), channels=1, dimension=8, n_filters=4, n_residual_layers=1, ratios=[4, 2], lstm=1),
    "encodec:decoder": recipe("encodec.modules:SEANetDecoder", noise(1, 8, 20), channels=1, dimension=8, n_filters=4, n_residual_layers=1, ratios=[4, 2], lstm=0),
    "demucs:demucs": recipe("demucs.demucs:Demucs", noise(1, 2, 2048), sources=["a", "b"], audio_channels=2, channels=8, depth=2, lstm_layers=1, resample=False, dconv_mode=0),
    "openai-whisper:whisper": recipe("whisper.model:Whisper", lambda: (torch.randn(1, 8, 20), tokens(1, 5)), recipe("whisper.model:ModelDimensions", noise(1), 8, 10, 16, 2, 1, 32, 8, 16, 2, 1)),
    "torchlibrosa:logmel": recipe("torchlibrosa.stft:LogmelFilterBank", lambda: torch.rand(1, 1, 6, 33), sr=8000, n_fft=64, n_mels=8),
    "panns-inference:cnn14": recipe("panns_inference.models:Cnn14", noise(1, 16000), sample_rate=8000, window_size=256, hop_size=80, mel_bins=64, fmin=50, fmax=4000, classes_num=5),
    "vocos:backbone": recipe("vocos.models:VocosBackbone", noise(1, 8, 12), 8, 16, 24, 2),
    "torchcrepe:crepe": recipe("torchcrepe:Crepe", noise(1, 1024), model="tiny"),
}  # fmt: skip


def _eeg(name: str, times: int = 256, **kwargs: object) -> Recipe:
    target = f"braindecode.models:{name}"
    return recipe(target, noise(2, 4, times), n_chans=4, n_outputs=3, n_times=times, sfreq=64, **kwargs)  # fmt: skip


BRAINDECODE = {
    "shallow": _eeg("ShallowFBCSPNet"),
    "deep4": _eeg("Deep4Net", 1000),
    "eegnet": _eeg("EEGNetv4"),
    "eegnet_v1": _eeg("EEGNetv1"),
    "eegnetx": _eeg("EEGNeX"),
    "conformer": _eeg("EEGConformer", 512),
    "tcn": _eeg("BDTCN", n_filters=8, n_blocks=2),
    "atcnet": _eeg("ATCNet"),
    "inception": _eeg("EEGInceptionERP"),
    "inception_mi": _eeg("EEGInceptionMI"),
    "itnet": _eeg("EEGITNet"),
    "fbcnet": _eeg("FBCNet"),
    "tidnet": _eeg("TIDNet"),
    "usleep": recipe("braindecode.models:USleep", noise(1, 2, 3000), n_chans=2, n_outputs=3, n_times=3000, sfreq=100, depth=3),
    "sleep_stager": _eeg("SleepStagerChambon2018", 512),
    "eegresnet": _eeg("EEGResNet", 256, n_first_filters=8),
    "sccnet": _eeg("SCCNet"),
    "sparcnet": _eeg("SPARCNet"),
    "msvtnet": _eeg("MSVTNet"),
}  # fmt: skip


def _forecast(name: str, **kwargs: object) -> Recipe:
    def windows() -> tuple[dict[str, object]]:
        return ({"insample_y": torch.randn(2, 12, 1), "insample_mask": torch.ones(2, 12, 1), "futr_exog": None, "hist_exog": None, "stat_exog": None},)  # fmt: skip

    return recipe(f"neuralforecast.models:{name}", windows, h=4, input_size=12, max_steps=1, accelerator="cpu", **kwargs)  # fmt: skip


def _multi(name: str, **kwargs: object) -> Recipe:
    def windows() -> tuple[dict[str, object]]:
        return ({"insample_y": torch.randn(2, 12, 3), "insample_mask": torch.ones(2, 12, 3), "futr_exog": None, "hist_exog": None, "stat_exog": None},)  # fmt: skip

    return recipe(f"neuralforecast.models:{name}", windows, h=4, input_size=12, n_series=3, max_steps=1, accelerator="cpu", **kwargs)  # fmt: skip


NEURALFORECAST = {
    "nhits": _forecast("NHITS", mlp_units=[[16, 16]] * 3),
    "nbeats": _forecast("NBEATS", mlp_units=[[16, 16]] * 3),
    "mlp": _forecast("MLP", hidden_size=16),
    "dlinear": _forecast("DLinear", moving_avg_window=3),
    "nlinear": _forecast("NLinear"),
    "tide": _forecast("TiDE", hidden_size=16, decoder_output_dim=4, temporal_decoder_dim=8),
    "tcn": _forecast("TCN", encoder_hidden_size=8, decoder_hidden_size=8),
    "gru": _forecast("GRU", encoder_hidden_size=8, decoder_hidden_size=8),
    "lstm": _forecast("LSTM", encoder_hidden_size=8, decoder_hidden_size=8),
    "rnn": _forecast("RNN", encoder_hidden_size=8, decoder_hidden_size=8),
    "bitcn": _forecast("BiTCN", hidden_size=8),
    "patchtst": _forecast("PatchTST", encoder_layers=1, n_heads=2, hidden_size=16, linear_hidden_size=16, patch_len=4, stride=2),
    "informer": _forecast("Informer", hidden_size=16, n_head=2, conv_hidden_size=8, encoder_layers=1, decoder_layers=1),
    "autoformer": _forecast("Autoformer", hidden_size=16, n_head=2, conv_hidden_size=8, encoder_layers=1, decoder_layers=1),
    "transformer": _forecast("VanillaTransformer", hidden_size=16, n_head=2, conv_hidden_size=8, encoder_layers=1, decoder_layers=1),
    "timesnet": _forecast("TimesNet", hidden_size=8, conv_hidden_size=8, encoder_layers=1),
    "tft": _forecast("TFT", hidden_size=8, n_head=2),
    "kan": _forecast("KAN", hidden_size=8),
    "itransformer": _multi("iTransformer", hidden_size=16, n_heads=2, e_layers=1, d_ff=16),
    "tsmixer": _multi("TSMixer", n_block=1, ff_dim=8),
    "softs": _multi("SOFTS", hidden_size=16, d_core=8, e_layers=1, d_ff=16),
    "stemgnn": _multi("StemGNN", n_stacks=2, multi_layer=2),
    "mlp_multivariate": _multi("MLPMultivariate", hidden_size=16),
    "timemixer": _multi("TimeMixer", d_model=8, d_ff=8, e_layers=1, down_sampling_layers=1),
    "rmok": _multi("RMoK"),
}  # fmt: skip

STATES = {
    "mambapy:mamba": recipe("mambapy.mamba:Mamba", noise(2, 8, 16), recipe("mambapy.mamba:MambaConfig", noise(1), d_model=16, n_layers=1, d_state=4)),
    "mambapy:mamba_sequential": recipe("mambapy.mamba:Mamba", noise(2, 8, 16), recipe("mambapy.mamba:MambaConfig", noise(1), d_model=16, n_layers=1, d_state=4, pscan=False)),
    "ncps:cfc": recipe("ncps.torch:CfC", noise(2, 5, 4), 4, 8),
    "ncps:ltc": recipe("ncps.torch:LTC", noise(2, 3, 4), 4, 6),
    "pytorch-tcn:tcn": recipe("pytorch_tcn:TCN", noise(2, 4, 16), 4, [8, 8], kernel_size=3, causal=True),
    "pytorch-tcn:tcn_batchnorm": recipe("pytorch_tcn:TCN", noise(2, 4, 16), 4, [8, 8], kernel_size=3, use_norm="batch_norm", use_skip_connections=True),
    "pykan:kan": recipe("kan:KAN", noise(4, 2), width=[2, 3, 1], grid=3, k=3, auto_save=False),
    "labml-nn:capsule": recipe("labml_nn.capsule_networks.mnist:MNISTCapsuleNetworkModel", image(28, 1)),
    "labml-nn:unet": recipe("labml_nn.unet:UNet", image(64, 1, 1), 1, 2),
    "labml-nn:resnet": recipe("labml_nn.resnet:ResNetBase", image(32), [1, 1], [8, 16], img_channels=3),
    "labml-nn:ddpm_unet": recipe("labml_nn.diffusion.ddpm.unet:UNet", lambda: (torch.randn(1, 3, 16, 16), torch.tensor([3])), image_channels=3, n_channels=32, ch_mults=(1, 1), is_attn=(False, False), n_blocks=1),
    "labml-nn:lstm": recipe("labml_nn.lstm:LSTM", noise(4, 2, 5), 5, 6, 1),
    "labml-nn:hypernet": recipe("labml_nn.hypernetworks.hyper_lstm:HyperLSTM", noise(4, 2, 5), 5, 6, 4, 3, 1),
    "labml-nn:rhn": recipe("labml_nn.recurrent_highway_networks:RHN", noise(4, 2, 5), 5, 6, 2, 1),
}  # fmt: skip


def _under(library: str, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    return {f"{library}:{name}": one for name, one in recipes.items()}


RECIPES = (
    _under("x-transformers", X_TRANSFORMERS)
    | LUCIDRAINS
    | SOUND
    | _under("braindecode", BRAINDECODE)
    | _under("neuralforecast", NEURALFORECAST)
    | STATES
)
