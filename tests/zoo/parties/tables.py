"""Tables, recommendation, graphs, flows, diffusion, operators, reinforcement learning, fields."""

from __future__ import annotations

from typing import Any

import torch

from zoo.parties.recipe import Recipe, image, nodes, noise, recipe, several, tokens

_DEFAULT = noise(1)


def part(target: str, *args: object, **kwargs: object) -> Recipe:
    """An argument that is built of a library's own class."""
    return recipe(target, _DEFAULT, *args, **kwargs)


TABULAR = {
    "pytorch-tabnet:tabnet": recipe("pytorch_tabnet.tab_network:TabNet", noise(8, 6), 6, 3, n_d=4, n_a=4, n_steps=2, group_attention_matrix=torch.eye(6)),
    "pytorch-tabnet:tabnet_entmax": recipe("pytorch_tabnet.tab_network:TabNet", noise(8, 6), 6, 3, n_d=4, n_a=4, n_steps=2, mask_type="entmax", group_attention_matrix=torch.eye(6)),
    "rtdl-revisiting-models:mlp": recipe("rtdl_revisiting_models:MLP", noise(4, 6), d_in=6, d_out=2, n_blocks=2, d_block=16, dropout=0.1),
    "rtdl-revisiting-models:resnet": recipe("rtdl_revisiting_models:ResNet", noise(4, 6), d_in=6, d_out=2, n_blocks=2, d_block=16, d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.1),
    "rtdl-revisiting-models:ft": recipe("rtdl_revisiting_models:FTTransformer", lambda: (torch.randn(4, 6), None), n_cont_features=6, cat_cardinalities=[], d_out=2, n_blocks=1, d_block=16, attention_n_heads=2, attention_dropout=0.0, ffn_d_hidden=16, ffn_d_hidden_multiplier=None, ffn_dropout=0.0, residual_dropout=0.0),
    "rtdl-num-embeddings:linear": recipe("rtdl_num_embeddings:LinearEmbeddings", noise(4, 6), 6, 8),
    "rtdl-num-embeddings:linear_relu": recipe("rtdl_num_embeddings:LinearReLUEmbeddings", noise(4, 6), 6, 8),
    "rtdl-num-embeddings:periodic": recipe("rtdl_num_embeddings:PeriodicEmbeddings", noise(4, 6), 6, 8, lite=False),
}  # fmt: skip


def _sparse(name: str) -> Recipe:
    return part("deepctr_torch.inputs:SparseFeat", name, vocabulary_size=8, embedding_dim=4)


def _ctr(name: str, **more: object) -> Recipe:
    features = part("builtins:list", part("zoo.parties.tables:gathered", _sparse("a"), _sparse("b"), part("deepctr_torch.inputs:DenseFeat", "c", 1)))  # fmt: skip
    one = {"linear_feature_columns": features, "dnn_feature_columns": features, "dnn_hidden_units": (8, 8)}  # fmt: skip

    def inputs() -> Any:
        return torch.cat([tokens(4, 2, below=8).float(), torch.randn(4, 1)], 1)

    return recipe(f"deepctr_torch.models:{name}", inputs, **(one | more), init_std=0.3)


def gathered(*items: object) -> list[object]:
    return list(items)


_MODELS = "DeepFM xDeepFM WDL DCN DCNMix AutoInt NFM IFM DIFM FiBiNET ONN"
DEEPCTR = {name.lower(): _ctr(name) for name in _MODELS.split()}

_RECHUB = "torch_rechub.basic"


def _rec(path: str, **kwargs: object) -> Recipe:
    def inputs() -> tuple[dict[str, Any]]:
        return ({"a": tokens(4, below=8), "b": tokens(4, below=8), "c": torch.randn(4)},)

    return recipe(f"torch_rechub.models.{path}", inputs, **kwargs)


def _features(dense: bool = True) -> Recipe:
    found = [part(f"{_RECHUB}.features:SparseFeature", n, vocab_size=8, embed_dim=4) for n in "ab"]
    if dense:
        found.append(part(f"{_RECHUB}.features:DenseFeature", "c"))
    return part("zoo.parties.tables:gathered", *found)


_MLP = {"dims": [8], "dropout": 0.0, "activation": "relu"}
RECHUB = {
    "deepfm": _rec("ranking.deepfm:DeepFM", deep_features=_features(), fm_features=_features(False), mlp_params=_MLP),
    "widedeep": _rec("ranking.widedeep:WideDeep", wide_features=_features(), deep_features=_features(), mlp_params=_MLP),
    "dcn": _rec("ranking.dcn:DCN", features=_features(False), n_cross_layers=2, mlp_params=_MLP),
    "dcn_v2": _rec("ranking.dcn_v2:DCNv2", features=_features(False), n_cross_layers=2, mlp_params=_MLP),
    "autoint": _rec("ranking.autoint:AutoInt", sparse_features=_features(False), dense_features=[], num_layers=1, num_heads=2, mlp_params=_MLP),
    "fibinet": _rec("ranking.fibinet:FiBiNet", features=_features(False), mlp_params=_MLP),
    "mmoe": _rec("multi_task.mmoe:MMOE", features=_features(), task_types=["classification", "regression"], n_expert=2, expert_params=_MLP, tower_params_list=[_MLP, _MLP]),
    "ple": _rec("multi_task.ple:PLE", features=_features(), task_types=["classification", "regression"], n_level=1, n_expert_specific=1, n_expert_shared=1, expert_params=_MLP, tower_params_list=[_MLP, _MLP]),
    "shared_bottom": _rec("multi_task.shared_bottom:SharedBottom", features=_features(), task_types=["classification", "regression"], bottom_params=_MLP, tower_params_list=[_MLP, _MLP]),
    "aitm": _rec("multi_task.aitm:AITM", features=_features(), n_task=2, bottom_params=_MLP, tower_params_list=[_MLP, _MLP]),
}  # fmt: skip


def _gnn(name: str, *args: object, **kwargs: object) -> Recipe:
    return recipe(f"torch_geometric.nn:{name}", nodes(), *args, **kwargs)


GEOMETRIC = {
    "gcn": _gnn("GCN", 8, 16, 2, 3),
    "gcn_batchnorm": _gnn("GCN", 8, 16, 2, 3, norm="batch_norm"),
    "gcn_jk": _gnn("GCN", 8, 16, 2, 3, jk="max"),
    "sage": _gnn("GraphSAGE", 8, 16, 2, 3),
    "sage_max": _gnn("GraphSAGE", 8, 16, 2, 3, aggr="max"),
    "gin": _gnn("GIN", 8, 16, 2, 3),
    "gat": _gnn("GAT", 8, 16, 2, 3, heads=2),
    "gatv2": _gnn("GAT", 8, 16, 2, 3, v2=True, heads=2),
    "edgecnn": _gnn("EdgeCNN", 8, 16, 2, 3),
    "unet": _gnn("GraphUNet", 8, 16, 3, 2),
    "mlp": recipe("torch_geometric.nn:MLP", noise(10, 8), [8, 16, 3]),
    "lightgcn": recipe("torch_geometric.nn:LightGCN", lambda: torch.randint(0, 10, (2, 20)), 10, 8, 2),
    "pmlp": _gnn("PMLP", 8, 16, 3, 2),
    "linkx": recipe("torch_geometric.nn:LINKX", nodes(), 10, 8, 16, 3, 2),
    "attentive_fp": recipe("torch_geometric.nn:AttentiveFP", lambda: (torch.randn(10, 8), torch.randint(0, 10, (2, 24)), torch.randn(24, 4), torch.zeros(10, dtype=torch.long)), 8, 16, 2, 4, 1, 1),
    "chebconv": _gnn("ChebConv", 8, 4, 3),
    "transformer_conv": _gnn("TransformerConv", 8, 4, 2),
    "graphconv": _gnn("GraphConv", 8, 4),
    "appnp": _gnn("APPNP", 3, 0.1),
    "tag": _gnn("TAGConv", 8, 4),
    "arma": _gnn("ARMAConv", 8, 4),
    "sg": _gnn("SGConv", 8, 4, 2),
    "gated": _gnn("GatedGraphConv", 8, 2),
    "resgated": _gnn("ResGatedGraphConv", 8, 4),
    "film": _gnn("FiLMConv", 8, 4),
    "mfconv": _gnn("MFConv", 8, 4),
    "feast": _gnn("FeaStConv", 8, 4),
    "cluster": _gnn("ClusterGCNConv", 8, 4),
    "gen": _gnn("GENConv", 8, 4),
    "le": _gnn("LEConv", 8, 4),
    "pointnet": recipe("torch_geometric.nn:PointNetConv", lambda: (torch.randn(10, 8), torch.randn(10, 3), torch.randint(0, 10, (2, 24))), part("torch.nn:Linear", 11, 8)),
    "meta_schnet": recipe("torch_geometric.nn:models.schnet.InteractionBlock", lambda: (torch.randn(10, 8), torch.randint(0, 10, (2, 24)), torch.rand(24), torch.randn(24, 6)), 8, 6, 8, 10.0),
}  # fmt: skip

FLOWS = {
    "nflows:maf": recipe("nflows.flows:MaskedAutoregressiveFlow", noise(4, 3), 3, 16, 2, 1, method="log_prob"),
    "nflows:realnvp": recipe("nflows.flows:SimpleRealNVP", noise(4, 4), 4, 16, 2, 1, method="log_prob"),
    "nflows:realnvp_batchnorm": recipe("nflows.flows:SimpleRealNVP", noise(4, 4), 4, 16, 2, 1, batch_norm_between_layers=True, method="log_prob"),
    "nflows:resnet": recipe("nflows.nn.nets:ResidualNet", noise(4, 4), 4, 2, 16, num_blocks=1, use_batch_norm=True),
    "nflows:made": recipe("nflows.transforms.made:MADE", noise(4, 4), 4, 16, num_blocks=1),
    "normflows:affine_coupling": recipe("normflows.flows:AffineCouplingBlock", noise(4, 4), part("normflows.nets:MLP", [2, 8, 4], init_zeros=False)),
    "normflows:planar": recipe("normflows.flows:Planar", noise(4, 4), (4,)),
    "normflows:spline": recipe("normflows.flows:AutoregressiveRationalQuadraticSpline", noise(4, 4), 4, 1, 8),
    "normflows:glow": recipe("normflows.flows:GlowBlock", image(4, 4), 4, 8),
    "zuko:maf": recipe("zoo.parties.tables:Density", noise(4, 3), part("zuko.flows:MAF", 3, transforms=2, hidden_features=(8, 8))),
    "zuko:nice": recipe("zoo.parties.tables:Density", noise(4, 4), part("zuko.flows:NICE", 4, transforms=2, hidden_features=(8, 8))),
    "zuko:distribution": recipe("zuko.flows:MAF", noise(4, 2), 3, 2, transforms=1, hidden_features=(8,)),
    "zuko:nsf_net": recipe("zuko.nn:MaskedMLP", noise(4, 3), torch.ones(5, 3, dtype=torch.bool), hidden_features=(8, 8)),
    "zuko:mlp": recipe("zuko.nn:MLP", noise(4, 3), 3, 2, hidden_features=(8, 8), normalize=True),
    "zuko:monotonic": recipe("zuko.nn:MonotonicMLP", noise(4, 3), 3, 2, hidden_features=(8, 8)),
    "freia:all_in_one": recipe("zoo.parties.tables:Coupled", noise(4, 6), "AllInOneBlock"),
    "freia:glow": recipe("zoo.parties.tables:Coupled", noise(4, 6), "GLOWCouplingBlock"),
    "freia:nice": recipe("zoo.parties.tables:Coupled", noise(4, 6), "NICECouplingBlock"),
    "freia:rnvp": recipe("zoo.parties.tables:Coupled", noise(4, 6), "RNVPCouplingBlock"),
}  # fmt: skip


class Density(torch.nn.Module):
    """The log-density of one of zuko's flows, whose forward gives a distribution."""

    def __init__(self, flow: torch.nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: torch.Tensor) -> Any:
        return self.flow().log_prob(x)


class Coupled(torch.nn.Module):
    """One of FrEIA's blocks, which take lists of tensors."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import FrEIA.modules

        def subnet(n: int, m: int) -> torch.nn.Module:
            hidden = torch.nn.Linear(n, 8)
            return torch.nn.Sequential(hidden, torch.nn.ReLU(), torch.nn.Linear(8, m))

        self.block = getattr(FrEIA.modules, name)([(6,)], subnet_constructor=subnet)

    def forward(self, x: torch.Tensor) -> Any:
        return self.block((x,), jac=True)


def _denoise(size: int = 16, channels: int = 3) -> Any:
    return lambda: (torch.randn(1, channels, size, size), torch.tensor([3]))


_LATENT = {"block_out_channels": (16, 16), "norm_num_groups": 4}
DIFFUSION = {
    "diffusers:unet2d": recipe("diffusers:UNet2DModel", _denoise(), sample_size=16, layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **_LATENT),
    "diffusers:unet_condition": recipe("diffusers:UNet2DConditionModel", lambda: (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)), sample_size=8, layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=8, **_LATENT),
    "diffusers:vae": recipe("diffusers:AutoencoderKL", image(16, batch=1), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **_LATENT),
    "diffusers:tiny_vae": recipe("diffusers:AutoencoderTiny", image(16, batch=1), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
    "diffusers:vq": recipe("diffusers:VQModel", image(16, batch=1), num_vq_embeddings=8, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **_LATENT),
    "diffusers:dit": recipe("diffusers:DiTTransformer2DModel", lambda: {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}, num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4),
    "denoising-diffusion-pytorch:unet": recipe("denoising_diffusion_pytorch:Unet", _denoise(), dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8),
    "denoising-diffusion-pytorch:unet1d": recipe("denoising_diffusion_pytorch:Unet1D", lambda: (torch.randn(1, 3, 16), torch.tensor([3])), dim=8, dim_mults=(1, 2), channels=3, attn_heads=2, attn_dim_head=8),
    "denoising-diffusion-pytorch:karras": recipe("denoising_diffusion_pytorch:KarrasUnet", lambda: (torch.randn(1, 4, 16, 16), torch.tensor([0.5])), image_size=16, dim=8, dim_max=16, num_downsamples=1, num_blocks_per_stage=1, attn_res=(8,), attn_dim_head=8),
}  # fmt: skip

FIELDS = {
    "neuraloperator:fno": recipe("neuralop.models:FNO", image(16, 1), n_modes=(4, 4), hidden_channels=8, in_channels=1, out_channels=1, n_layers=2),
    "neuraloperator:fno1d": recipe("neuralop.models:FNO", noise(2, 1, 16), n_modes=(4,), hidden_channels=8, in_channels=1, out_channels=1, n_layers=2),
    "neuraloperator:uno": recipe("neuralop.models:UNO", image(16, 1), in_channels=1, out_channels=1, hidden_channels=8, channel_mlp_skip="linear", uno_out_channels=[8, 8], uno_n_modes=[[4, 4], [4, 4]], uno_scalings=[[1, 1], [1, 1]], n_layers=2),
    "gpytorch:exact_kernel": recipe("gpytorch.kernels:RBFKernel", several((4, 3), (4, 3)), method="covar_dist"),
    "stylegan2-pytorch:discriminator": recipe("stylegan2_pytorch.stylegan2_pytorch:Discriminator", image(32), 32, network_capacity=2),
    "lightweight-gan:generator": recipe("lightweight_gan.lightweight_gan:Generator", noise(1, 16), image_size=32, latent_dim=16, fmap_max=16, attn_res_layers=[], freq_chan_attn=False),
    "pythae:vae": recipe("pythae.models.nn.default_architectures:Encoder_VAE_MLP", image(8, 1), part("pythae.models:VAEConfig", input_dim=(1, 8, 8), latent_dim=4)),
    "pythae:decoder": recipe("pythae.models.nn.default_architectures:Decoder_AE_MLP", noise(2, 4), part("pythae.models:VAEConfig", input_dim=(1, 8, 8), latent_dim=4)),
    "torchgan:dcgan_generator": recipe("torchgan.models:DCGANGenerator", noise(2, 8), encoding_dims=8, out_size=16, out_channels=1, step_channels=4),
    "torchgan:dcgan_discriminator": recipe("torchgan.models:DCGANDiscriminator", image(16, 1), in_size=16, in_channels=1, step_channels=4),
}  # fmt: skip


def _rate(_: float) -> float:
    return 1e-3


_BOX = {"low": -1.0, "high": 1.0, "shape": (5,)}


def _policy(name: str, kind: str, actions: Recipe, inputs: Any = None, **more: object) -> Recipe:
    space = part("gymnasium.spaces:Box", **_BOX)
    return recipe(f"stable_baselines3.{name}", inputs or noise(3, 5), space, actions, lr_schedule=_rate, **more)  # fmt: skip


_CONTINUOUS = part("gymnasium.spaces:Box", low=-1.0, high=1.0, shape=(2,))
_DISCRETE = part("gymnasium.spaces:Discrete", 3)


AGENTS = {
    "stable-baselines3:dqn": _policy("dqn.policies:DQNPolicy", "", _DISCRETE, net_arch=[16]),
    "stable-baselines3:qnet": recipe("stable_baselines3.common.torch_layers:FlattenExtractor", noise(3, 5), part("gymnasium.spaces:Box", **_BOX)),
    "stable-baselines3:sac_actor": recipe("stable_baselines3.sac.policies:Actor", noise(3, 5), part("gymnasium.spaces:Box", **_BOX), _CONTINUOUS, [16], part("stable_baselines3.common.torch_layers:FlattenExtractor", part("gymnasium.spaces:Box", **_BOX)), 5, method="get_action_dist_params"),
    "stable-baselines3:td3_actor": recipe("stable_baselines3.td3.policies:Actor", noise(3, 5), part("gymnasium.spaces:Box", **_BOX), _CONTINUOUS, [16], part("stable_baselines3.common.torch_layers:FlattenExtractor", part("gymnasium.spaces:Box", **_BOX)), 5),
    "stable-baselines3:critic": recipe("stable_baselines3.common.policies:ContinuousCritic", several((3, 5), (3, 2)), part("gymnasium.spaces:Box", **_BOX), _CONTINUOUS, [16], part("stable_baselines3.common.torch_layers:FlattenExtractor", part("gymnasium.spaces:Box", **_BOX)), 5),
    "stable-baselines3:mlp_extractor": recipe("stable_baselines3.common.torch_layers:MlpExtractor", noise(3, 5), 5, {"pi": [16], "vf": [16]}, torch.nn.ReLU),
    "sb3-contrib:quantile": recipe("sb3_contrib.qrdqn.policies:QuantileNetwork", noise(3, 5), part("gymnasium.spaces:Box", **_BOX), _DISCRETE, part("stable_baselines3.common.torch_layers:FlattenExtractor", part("gymnasium.spaces:Box", **_BOX)), 5, n_quantiles=4, net_arch=[16]),
    "pfrl:dueling": recipe("pfrl.q_functions:DuelingDQN", noise(1, 4, 84, 84), 3, n_input_channels=4),
    "pfrl:fc_q": recipe("pfrl.q_functions:FCStateQFunctionWithDiscreteAction", noise(3, 5), 5, 3, 8, 1),
    "pfrl:atari_cnn": recipe("pfrl.nn:SmallAtariCNN", noise(1, 4, 84, 84)),
    "pfrl:mlp_bn": recipe("pfrl.nn:MLPBN", noise(4, 5), 5, 3, [8]),
    "pfrl:noisy": recipe("pfrl.nn:FactorizedNoisyLinear", noise(4, 5), part("torch.nn:Linear", 5, 3)),
    "tianshou:dqn": recipe("tianshou.env.atari.atari_network:DQNet", noise(1, 4, 84, 84), 4, 84, 84, 3),
    "tianshou:mlp": recipe("tianshou.utils.net.common:MLP", noise(4, 5), input_dim=5, output_dim=3, hidden_sizes=[8, 8]),
    "tianshou:net": recipe("tianshou.utils.net.common:Net", noise(4, 5), state_shape=5, action_shape=3, hidden_sizes=[8, 8]),
    "tensordict:normal_params": recipe("tensordict.nn:NormalParamExtractor", noise(4, 6)),
}  # fmt: skip

EQUIVARIANT = {
    "e3nn:fully_connected": recipe("e3nn.nn:FullyConnectedNet", noise(4, 3), [3, 8, 2], torch.relu),
    "e3nn:linear": recipe("e3nn.o3:Linear", noise(4, 5), "2x0e+1x1o", "3x0e+1x1o"),
    "xlstm:gated_ffn": recipe("xlstm.components.feedforward:GatedFeedForward", noise(2, 4, 8), part("xlstm.components.feedforward:FeedForwardConfig", proj_factor=2.0, embedding_dim=8)),
}  # fmt: skip


def _under(library: str, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    return {f"{library}:{name}": one for name, one in recipes.items()}


RECIPES = (
    TABULAR
    | _under("deepctr-torch", DEEPCTR)
    | _under("torch-rechub", RECHUB)
    | _under("torch-geometric", GEOMETRIC)
    | FLOWS
    | DIFFUSION
    | FIELDS
    | AGENTS
    | EQUIVARIANT
)
