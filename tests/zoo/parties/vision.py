"""Images and volumes: transformers, segmentation, medical, super resolution, features."""

from __future__ import annotations

from functools import partial

import torch

from zoo.parties.recipe import Recipe, image, noise, recipe, several, volume

_VIT = {"num_classes": 10, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48}


def _vit(module: str, name: str, size: int = 32, **more: object) -> Recipe:
    return recipe(f"vit_pytorch.{module}:{name}", image(size), **more)


VIT_PYTORCH = {
    "vit": _vit("vit", "ViT", image_size=32, patch_size=8, **_VIT),
    "simple_vit": _vit("simple_vit", "SimpleViT", image_size=32, patch_size=8, **_VIT),
    "simple_vit_qk": _vit("simple_vit_with_qk_norm", "SimpleViT", image_size=32, patch_size=8, **_VIT),
    "simple_vit_registers": _vit("simple_vit_with_register_tokens", "SimpleViT", image_size=32, patch_size=8, **_VIT),
    "simple_vit_fft": _vit("simple_vit_with_fft", "SimpleViT", image_size=32, patch_size=8, freq_patch_size=8, **_VIT),
    "simple_vit_value_residual": _vit("simple_vit_with_value_residual", "SimpleViT", image_size=32, patch_size=8, **_VIT),
    "deepvit": _vit("deepvit", "DeepViT", image_size=32, patch_size=8, **_VIT),
    "cait": _vit("cait", "CaiT", image_size=32, patch_size=8, cls_depth=1, **_VIT),
    "parallel_vit": _vit("parallel_vit", "ViT", image_size=32, patch_size=8, **_VIT),
    "patch_merger": _vit("vit_with_patch_merger", "ViT", image_size=32, patch_size=8, **_VIT),
    "small_dataset": _vit("vit_for_small_dataset", "ViT", image_size=32, patch_size=8, **_VIT),
    "normalized_vit": _vit("normalized_vit", "nViT", image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, dim_head=16, mlp_dim=48),
    "cct": _vit("cct", "cct_2", img_size=32, num_classes=10, n_conv_layers=1, kernel_size=3, stride=2, padding=1, pooling_kernel_size=3, pooling_stride=2, pooling_padding=1),
    "pit": _vit("pit", "PiT", image_size=32, patch_size=8, num_classes=10, dim=32, depth=(1, 1), heads=2, mlp_dim=48),
    "t2t": _vit("t2t", "T2TViT", image_size=32, num_classes=10, dim=32, depth=1, heads=2, mlp_dim=48, t2t_layers=((7, 4), (3, 2))),
    "levit": _vit("levit", "LeViT", 64, image_size=64, num_classes=10, dim=(32, 48, 64), depth=1, heads=(2, 3, 4), mlp_mult=2),
    "cvt": _vit("cvt", "CvT", 64, num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s2_heads=2, s3_emb_dim=32, s3_heads=2, s3_depth=1),
    "twins": _vit("twins_svt", "TwinsSVT", 224, num_classes=10, s1_emb_dim=16, s1_local_patch_size=4, s2_emb_dim=16, s2_local_patch_size=2, s3_emb_dim=32, s3_local_patch_size=2, s3_depth=1, s4_emb_dim=32, s4_local_patch_size=1, peg_kernel_size=3),
    "regionvit": _vit("regionvit", "RegionViT", 224, dim=(16, 16, 32, 32), depth=(1, 1, 1, 1), window_size=7, num_classes=10, tokenize_local_3_conv=False),
    "crossvit": _vit("cross_vit", "CrossViT", 64, image_size=64, num_classes=10, depth=1, sm_dim=32, sm_patch_size=8, sm_enc_depth=1, sm_enc_heads=2, sm_enc_mlp_dim=48, lg_dim=48, lg_patch_size=16, lg_enc_depth=1, lg_enc_heads=2, lg_enc_mlp_dim=64, cross_attn_depth=1, cross_attn_heads=2),
    "crossformer": _vit("crossformer", "CrossFormer", 224, num_classes=10, dim=(32, 32, 64, 64), depth=(1, 1, 1, 1), global_window_size=(8, 4, 2, 1), local_window_size=7),
    "mobilevit": _vit("mobile_vit", "MobileViT", 64, image_size=(64, 64), dims=[16, 24, 32], channels=[8, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64], num_classes=10),
    "max_vit": _vit("max_vit", "MaxViT", 224, num_classes=10, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=7),
    "nest": _vit("nest", "NesT", 32, image_size=32, patch_size=4, dim=16, heads=2, num_hierarchies=2, block_repeats=(1, 1), num_classes=10),
    "xcit": _vit("xcit", "XCiT", 32, image_size=32, patch_size=8, cls_depth=1, **_VIT),
    "rvt": _vit("rvt", "RvT", 32, image_size=32, patch_size=8, **_VIT),
    "scalable_vit": _vit("scalable_vit", "ScalableViT", 64, num_classes=10, dim=16, heads=(1, 1, 2, 2), depth=(1, 1, 1, 1), ssa_dim_key=(8, 8, 8, 8), reduction_factor=(4, 4, 2, 1), window_size=(16, 8, None, None)),
    "sep_vit": _vit("sep_vit", "SepViT", 224, num_classes=10, dim=16, dim_head=8, heads=(1, 1, 2, 2), depth=(1, 1, 1, 1), window_size=7),
    "simple_uvit": _vit("simple_uvit", "SimpleUViT", image_size=32, patch_size=8, **_VIT),
    "vit_1d": recipe("vit_pytorch.vit_1d:ViT", noise(2, 3, 64), seq_len=64, patch_size=8, **_VIT),
    "vit_3d": recipe("vit_pytorch.vit_3d:ViT", noise(1, 3, 4, 16, 16), image_size=16, frames=4, image_patch_size=8, frame_patch_size=2, **_VIT),
    "vivit": recipe("vit_pytorch.vivit:ViViT", noise(1, 3, 4, 16, 16), image_size=16, frames=4, image_patch_size=8, frame_patch_size=2, spatial_depth=1, temporal_depth=1, num_classes=10, dim=32, heads=2, mlp_dim=48),
}  # fmt: skip

_MONAI_3D = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}


def _monai(name: str, inputs: object, *args: object, **kwargs: object) -> Recipe:
    return recipe(f"monai.networks.nets:{name}", inputs, *args, **kwargs)  # type: ignore[arg-type]


MONAI = {
    "unet": _monai("UNet", image(32, 1), spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1),
    "attention_unet": _monai("AttentionUnet", image(32, 1), spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2)),
    "basic_unet": _monai("BasicUNet", image(32, 1), spatial_dims=2, in_channels=1, out_channels=2, features=(8, 8, 16, 16, 32, 8)),
    "basic_unet++": _monai("BasicUNetPlusPlus", image(32, 1), spatial_dims=2, in_channels=1, out_channels=2, features=(8, 8, 16, 16, 32, 8)),
    "dynunet": _monai("DynUNet", image(32, 1), spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[8, 16, 32], res_block=True),
    "segresnet": _monai("SegResNet", volume(16), init_filters=8, blocks_down=(1, 1), blocks_up=(1,), **_MONAI_3D),
    "unetr": _monai("UNETR", volume(32), img_size=(32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2, in_channels=1, out_channels=2),
    "swin_unetr": _monai("SwinUNETR", volume(64), in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "densenet": _monai("DenseNet", image(32, 1), spatial_dims=2, in_channels=1, out_channels=2, init_features=8, growth_rate=4, block_config=(2, 2)),
    "resnet": _monai("ResNet", volume(16), block="basic", layers=[1, 1, 1, 1], block_inplanes=[8, 16, 16, 32], spatial_dims=3, n_input_channels=1, num_classes=2),
    "efficientnet": _monai("EfficientNetBN", image(64, 1), "efficientnet-b0", spatial_dims=2, in_channels=1, num_classes=3, pretrained=False),
    "highresnet": _monai("HighResNet", volume(16), **_MONAI_3D),
    "regressor": _monai("Regressor", image(32, 1), (1, 32, 32), (2,), (8, 16), (2, 2)),
    "classifier": _monai("Classifier", image(32, 1), (1, 32, 32), 3, (8, 16), (2, 2)),
    "discriminator": _monai("Discriminator", image(32, 1), (1, 32, 32), (8, 16), (2, 2)),
    "generator": _monai("Generator", noise(2, 8), (8,), (8, 4, 4), (8, 4), (2, 2)),
    "autoencoder": _monai("AutoEncoder", image(32, 1), spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16), strides=(2, 2)),
    "var_autoencoder": _monai("VarAutoEncoder", image(32, 1), spatial_dims=2, in_shape=(1, 32, 32), out_channels=1, latent_size=4, channels=(8, 16), strides=(2, 2)),
    "fully_connected": _monai("FullyConnectedNet", noise(2, 10), 10, 3, [16, 8]),
    "flexible_unet": _monai("FlexibleUNet", image(64, 3), 3, 2, "efficientnet-b0", spatial_dims=2),
    "voxelmorph": _monai("VoxelMorphUNet", noise(1, 2, 32, 32), spatial_dims=2, in_channels=2, unet_out_channels=8, channels=(8, 8, 8, 8), final_conv_channels=(8,)),
    "autoencoder_kl": _monai("AutoencoderKL", image(16, 1), spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=(1, 1), channels=(8, 16), attention_levels=(False, True), latent_channels=2, norm_num_groups=4),
    "vqvae": _monai("VQVAE", image(16, 1), spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16), num_res_layers=1, num_res_channels=(8, 16), downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2, num_embeddings=8, embedding_dim=4),
    "mednext": _monai("MedNeXt", volume(32), spatial_dims=3, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1), encoder_expansion_ratio=2, decoder_expansion_ratio=2, bottleneck_expansion_ratio=2),
    "quicknat": _monai("Quicknat", image(64, 1), num_classes=2, num_channels=1, num_filters=8),
    "vit": _monai("ViT", image(32, 1), in_channels=1, img_size=(32, 32), patch_size=(8, 8), hidden_size=32, mlp_dim=48, num_layers=2, num_heads=2, classification=True, num_classes=3, spatial_dims=2),
}  # fmt: skip


def _smp(name: str, encoder: str = "resnet18", **more: object) -> Recipe:
    target = f"segmentation_models_pytorch:{name}"
    return recipe(target, image(64), encoder_name=encoder, encoder_weights=None, **more)


SMP = {
    "unet": _smp("Unet", decoder_channels=(32, 16, 16, 8, 8)),
    "unet_scse": _smp("Unet", decoder_channels=(32, 32, 32, 16, 16), decoder_attention_type="scse"),
    "unet++": _smp("UnetPlusPlus", decoder_channels=(32, 16, 16, 8, 8)),
    "manet": _smp("MAnet", decoder_channels=(32, 16, 16, 8, 8)),
    "linknet": _smp("Linknet"),
    "fpn": _smp("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32),
    "pspnet": _smp("PSPNet", psp_out_channels=32),
    "pan": recipe("segmentation_models_pytorch:PAN", image(128), encoder_name="resnet18", encoder_weights=None),
    "deeplabv3": _smp("DeepLabV3", decoder_channels=32),
    "deeplabv3+": _smp("DeepLabV3Plus", decoder_channels=32),
    "upernet": _smp("UPerNet", decoder_channels=32),
    "segformer": _smp("Segformer", decoder_segmentation_channels=32),
    "unet_mobilenet": _smp("Unet", "mobilenet_v2", decoder_channels=(32, 16, 16, 8, 8)),
    "unet_efficientnet": _smp("Unet", "efficientnet-b0", decoder_channels=(32, 16, 16, 8, 8)),
    "unet_mit": _smp("Unet", "mit_b0", decoder_channels=(32, 16, 16, 8, 8)),
}  # fmt: skip

_SPANDREL = "spandrel.architectures"


def _sr(name: str, path: str, size: int = 16, **kwargs: object) -> Recipe:
    return recipe(f"{_SPANDREL}.{path}", image(size, batch=1), **kwargs)


SPANDREL = {
    "esrgan": _sr("", "ESRGAN.__arch.RRDB:RRDBNet", in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=2),
    "compact": _sr("", "Compact.__arch.SRVGG:SRVGGNetCompact", num_feat=8, num_conv=2, upscale=2),
    "swinir": _sr("", "SwinIR.__arch.SwinIR:SwinIR", img_size=16, embed_dim=12, depths=[1], num_heads=[2], window_size=4, mlp_ratio=2, upscale=2, upsampler="pixelshuffle"),
    "swin2sr": _sr("", "Swin2SR.__arch.Swin2SR:Swin2SR", img_size=16, embed_dim=12, depths=[1], num_heads=[2], window_size=4, mlp_ratio=2, upscale=2, upsampler="pixelshuffle"),
    "span": _sr("", "SPAN.__arch.span:SPAN", num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
    "nafnet": _sr("", "NAFNet.__arch.NAFNet_arch:NAFNet", width=8, enc_blk_nums=[1, 1], middle_blk_num=1, dec_blk_nums=[1, 1]),
    "dncnn": _sr("", "DnCNN.__arch.network_dncnn:DnCNN", in_nc=3, out_nc=3, nc=8, nb=3),
    "omnisr": _sr("", "OmniSR.__arch.OmniSR:OmniSR", num_feat=16, res_num=1, block_num=1, up_scale=2, window_size=8),
    "plksr": _sr("", "PLKSR.__arch.PLKSR:PLKSR", dim=8, n_blocks=1, upscaling_factor=2),
    "safmn": _sr("", "SAFMN.__arch.safmn:SAFMN", dim=8, n_blocks=1, upscaling_factor=2),
    "hat": _sr("", "HAT.__arch.HAT:HAT", img_size=16, embed_dim=60, depths=(1,), num_heads=(2,), window_size=4, upscale=2, img_range=1.0),
    "uformer": _sr("", "Uformer.__arch.Uformer:Uformer", 128, img_size=128, embed_dim=8, depths=[1] * 9, num_heads=[1, 1, 1, 1, 1, 1, 1, 1, 1], win_size=8),
}  # fmt: skip

KORNIA = {
    "hardnet": recipe("kornia.feature:HardNet", image(32, 1), pretrained=False),
    "hynet": recipe("kornia.feature:HyNet", image(32, 1), pretrained=False),
    "sosnet": recipe("kornia.feature:SOSNet", image(32, 1), pretrained=False),
    "tfeat": recipe("kornia.feature:TFeat", image(32, 1), pretrained=False),
    "keynet": recipe("kornia.feature:KeyNet", image(32, 1), pretrained=False),
    "vit": recipe("kornia.models.vit:VisionTransformer", image(32), image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    "tiny_vit": recipe("kornia.models.tiny_vit:TinyViT", image(64), img_size=64, num_classes=5, embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), window_sizes=(4, 4, 4, 2)),
    "xfeat": recipe("kornia.feature.xfeat:XFeatModel", image(64, 1)),
}  # fmt: skip

SMALL_VISION = {
    "efficientnet-pytorch:b0": recipe("efficientnet_pytorch:EfficientNet.from_name", image(64), "efficientnet-b0", num_classes=10),
    "pretrainedmodels:squeezenet": recipe("pretrainedmodels:squeezenet1_1", image(64), num_classes=10, pretrained=None),
    "pretrainedmodels:bninception": recipe("pretrainedmodels:bninception", image(224, batch=1), num_classes=10, pretrained=None),
    "pretrainedmodels:xception": recipe("pretrainedmodels:xception", image(96, batch=1), num_classes=10, pretrained=None),
    "pretrainedmodels:dpn68": recipe("pretrainedmodels:dpn68", image(224, batch=1), num_classes=10, pretrained=None),
    "pretrainedmodels:resnet18": recipe("pretrainedmodels:resnet18", image(224, batch=1), num_classes=1000, pretrained=None),
    "facenet-pytorch:inception_resnet": recipe("facenet_pytorch:InceptionResnetV1", image(96), classify=True, num_classes=10),
    "facenet-pytorch:pnet": recipe("facenet_pytorch.models.mtcnn:PNet", image(24), pretrained=False),
    "facenet-pytorch:rnet": recipe("facenet_pytorch.models.mtcnn:RNet", image(24), pretrained=False),
    "facenet-pytorch:onet": recipe("facenet_pytorch.models.mtcnn:ONet", image(48), pretrained=False),
    "geffnet:mixnet_s": recipe("geffnet:mixnet_s", image(64), pretrained=False, num_classes=10),
    "geffnet:mobilenetv3": recipe("geffnet:mobilenetv3_small_075", image(64), pretrained=False, num_classes=10),
    "resnest:resnest50": recipe("resnest.torch:resnest50", image(64), pretrained=False, num_classes=10),
    "unet:unet2d": recipe("unet:UNet2D", image(32, 1), num_encoding_blocks=2, out_channels_first_layer=8),
    "unet:unet3d": recipe("unet:UNet3D", volume(24), num_encoding_blocks=2, out_channels_first_layer=4),
    "torchxrayvision:densenet": recipe("torchxrayvision.models:DenseNet", image(64, 1), growth_rate=4, block_config=(2, 2), num_init_features=8, weights=None),
    "lpips:alex": recipe("lpips:LPIPS", several((1, 3, 64, 64), (1, 3, 64, 64)), net="alex", pretrained=False, pnet_rand=True, verbose=False),
    "segment-anything:image_encoder": recipe("segment_anything.modeling:ImageEncoderViT", image(64, batch=1), img_size=64, patch_size=8, embed_dim=16, depth=2, num_heads=2, out_chans=8, window_size=4, global_attn_indexes=(1,), use_rel_pos=True),
    "open-clip-torch:clip": recipe("open_clip.model:CLIP", lambda: (torch.randn(2, 3, 32, 32), torch.randint(0, 64, (2, 16))), embed_dim=16, vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}, text_cfg={"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}),
    "effdet:d0": recipe("effdet:create_model", image(128, batch=1), "efficientdet_d0", pretrained=False, pretrained_backbone=False, image_size=(128, 128)),
    "dynamic-network-architectures:plain": recipe("dynamic_network_architectures.architectures.unet:PlainConvUNet", image(32, 1), input_channels=1, n_stages=3, features_per_stage=(8, 16, 16), conv_op=torch.nn.Conv2d, kernel_sizes=3, strides=(1, 2, 2), n_conv_per_stage=1, num_classes=2, n_conv_per_stage_decoder=1, norm_op=torch.nn.InstanceNorm2d, norm_op_kwargs={"affine": True}, nonlin=torch.nn.LeakyReLU),
    "dynamic-network-architectures:residual": recipe("dynamic_network_architectures.architectures.unet:ResidualEncoderUNet", image(32, 1), input_channels=1, n_stages=3, features_per_stage=(8, 16, 16), conv_op=torch.nn.Conv2d, kernel_sizes=3, strides=(1, 2, 2), n_blocks_per_stage=1, num_classes=2, n_conv_per_stage_decoder=1, norm_op=torch.nn.BatchNorm2d, nonlin=torch.nn.ReLU),
    "compressai:factorized": recipe("compressai.models:FactorizedPrior", image(64, batch=1), 8, 12),
    "compressai:hyperprior": recipe("compressai.models:ScaleHyperprior", image(64, batch=1), 8, 12),
    "easyocr:crnn": recipe("easyocr.model.model:Model", lambda: (torch.randn(1, 1, 32, 64), torch.zeros(1, 5)), 1, 16, 16, 20),
    "easyocr:vgg": recipe("easyocr.model.vgg_model:Model", lambda: (torch.randn(1, 1, 64, 64), torch.zeros(1, 5)), 1, 16, 16, 20),
}  # fmt: skip


def _cv(name: str, size: int = 224) -> Recipe:
    return recipe(
        "pytorchcv.model_provider:get_model",
        image(size, batch=1 if size > 64 else 2),
        name,
        pretrained=False,
    )


PYTORCHCV = {name: _cv(name) for name in ("shufflenetv2b_wd2", "menet108_8x1_g3", "igcv3_wd4", "fdmobilenet_wd4", "proxylessnas_cpu", "fbnet_cb", "ghostnet", "diracnet18v2", "bam_resnet18", "cbam_resnet18", "seresnet10", "preresnet10", "resneta10", "resnetd50b", "ibn_densenet121", "hardnet39ds", "peleenet", "darknet_tiny", "mobilenetb_wd4", "spnasnet", "espnetv2_wd2", "vovnet27s", "dla34", "sknet50", "condensenet74_c4_g4")}  # fmt: skip
PYTORCHCV |= {
    "nin_cifar10": _cv("nin_cifar10", 32),
    "shakeshakeresnet20": _cv("shakeshakeresnet20_2x16d_cifar10", 32),
    "rorresnet56": _cv("ror3_56_cifar10", 32),
    "wrn16": _cv("wrn16_10_cifar10", 32),
    "xdensenet40": _cv("xdensenet40_2_k24_bc_cifar10", 32),
}

_DOCTR = {"pretrained": False}
_DOCTR_BACKBONE = _DOCTR | {"pretrained_backbone": False}  # they would be downloaded
DOCTR = {
    "crnn_vgg16": recipe("doctr.models.recognition:crnn_vgg16_bn", noise(1, 3, 32, 128), **_DOCTR_BACKBONE),
    "crnn_mobilenet": recipe("doctr.models.recognition:crnn_mobilenet_v3_small", noise(1, 3, 32, 128), **_DOCTR_BACKBONE),
    "vitstr": recipe("doctr.models.recognition:vitstr_small", noise(1, 3, 32, 128), **_DOCTR),
    "db_mobilenet": recipe("doctr.models.detection:db_mobilenet_v3_large", image(64, batch=1), **_DOCTR_BACKBONE),
    "linknet": recipe("doctr.models.detection:linknet_resnet18", image(64, batch=1), **_DOCTR_BACKBONE),
    "fast_tiny": recipe("doctr.models.detection:fast_tiny", image(64, batch=1), **_DOCTR_BACKBONE),
    "textnet": recipe("doctr.models.classification:textnet_tiny", image(32), **_DOCTR),
}  # fmt: skip

SUPER_IMAGE = {
    name: recipe(
        f"super_image:{name}Model",
        image(16, batch=1),
        recipe(f"super_image:{name}Config", partial(int), scale=2, **more),
    )
    for name, more in {
        "Edsr": {"n_resblocks": 2, "n_feats": 8},
        "Msrn": {"n_blocks": 2, "n_feats": 8},
        "A2n": {},
        "Pan": {},
        "Carn": {},
        "Awsrn": {},
        "Rcan": {"n_resgroups": 1, "n_resblocks": 1, "n_feats": 16},
    }.items()
}


def _under(library: str, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    return {f"{library}:{name}": one for name, one in recipes.items()}


RECIPES = (
    _under("vit-pytorch", VIT_PYTORCH)
    | _under("monai", MONAI)
    | _under("segmentation-models-pytorch", SMP)
    | _under("spandrel", SPANDREL)
    | _under("kornia", KORNIA)
    | SMALL_VISION
    | _under("pytorchcv", PYTORCHCV)
    | _under("python-doctr", DOCTR)
    | _under("super-image", SUPER_IMAGE)
)
