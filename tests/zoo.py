"""Models that nobody adapted: timm's, torchvision's and transformers', the smallest of each family,
randomly initialised, each with the inputs of one forward pass (a batch of two)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from freezeout.layers import ExampleInputs

CLASSES = 10

# Name in timm, image size, whether the network must be told it; other arguments.
TIMM = """
beit_base_patch16_224 32 img_size depth=4
caformer_s18 32
cait_xxs24_224 32 img_size
coat_lite_tiny 32 img_size
coat_tiny 32 img_size
coatnet_pico_rw_224 32 img_size
coatnext_nano_rw_224 32 img_size
convformer_s18 32
convit_tiny 32 img_size
convmixer_768_32 32
convnext_atto 32
convnextv2_atto 32
cpubone_nano 32
crossvit_9_dagger_240 32
cs3darknet_focus_s 32
csatv2 64
cspnext_tiny 32
cspresnet50 32
darknet17 32
davit_tiny 32
deepseek_vit_412m 224 depth=2
deit3_small_patch16_224 32 img_size
deit_tiny_distilled_patch16_224 32 img_size
deit_tiny_patch16_224 32 img_size
densenet121 32
densenetblur121d 32
dla46_c 32
dla60_res2net 32
dpn48b 32
eca_botnext26ts_256 32 img_size
eca_nfnet_l0 32
ecaresnet26t 32
edgenext_xx_small 32
efficientformer_l1 224
efficientformerv2_s0 32 img_size
efficientnet_b0 32
efficientnet_es 32
efficientvim_m1 32
efficientvit_b0 32
efficientvit_m0 32
ese_vovnet19b_slim_dw 32
eva02_tiny_patch14_224 32 img_size
fasternet_t0 32
fastvit_t8 32
fbnetc_100 32
fbnetv3_b 32
flexivit_small 32 img_size
focalnet_tiny_srf 32
gcvit_xxtiny 32 img_size
gemma4_vit_167m 32 depth=4
gernet_s 32
ghostnet_050 32
ghostnetv2_100 64
ghostnetv3_050 64
gmixer_12_224 32 img_size
gmlp_ti16_224 32 img_size
hardcorenas_a 32
hgnet_tiny 32
hgnetv2_b0 32
hiera_tiny_224 32 img_size
hrnet_w18_small 32
iformer_t 32
inception_next_atto 32
inception_resnet_v2 96
inception_v3 96
inception_v4 96
lambda_resnet26rpt_256 32 img_size
lcnet_035 32
lcnetv2_small 32
legacy_seresnet18 32
legacy_seresnext26_32x4d 32
legacy_xception 32
levit_128s 32 img_size
lowformer_b0 32
mambaout_femto 32
maxvit_pico_rw_256 32 img_size
maxxvitv2_nano_rw_256 32 img_size
mixer_s32_224 32 img_size
mixnet_s 32
mnasnet_small 32
mobilenet_edgetpu_v2_xs 32
mobilenetv2_035 32
mobilenetv3_small_050 32
mobilenetv4_conv_small 32
mobilenetv5_base 32
mobileone_s0 32
mobilevit_xxs 32
mobilevitv2_050 32
mvitv2_tiny 32
naflexvit_base_patch16_gap 32
nasnetalarge 32
nest_tiny 32 img_size
nextvit_small 32
nf_regnet_b0 32
pit_ti_224 32 img_size
pit_ti_distilled_224 32 img_size
pnasnet5large 32
poolformer_s12 32
pvt_v2_b0 32
qwen3_vit_88m 32 depth=4
rdnet_tiny 32
regnetv_040 32
regnetx_002 32
regnety_002 32
regnetz_005 32
repghostnet_050 32
repvgg_a0 32
repvit_m0_9 32
res2net50_14w_8s 32
resmlp_12_224 32 img_size
resnest14d 32
resnet10t 32
resnet18 32
resnetrs50 32
resnetv2_18 32
rexnet_100 32
sam2_hiera_tiny 32
samvit_base_patch16_224 32 depth=4
selecsls42 32
sequencer2d_s 32
seresnet18 32
shvit_s1 32
skresnet18 32
starnet_s050 32
swiftformer_xs 32
swin_tiny_patch4_window7_224 32 img_size
swinv2_cr_tiny_224 32 img_size
swinv2_tiny_window8_256 32 img_size
test_vit 32
tf_efficientnetv2_b0 32
tiny_vit_5m_224 32
tinynet_e 32
tnt_s_patch16_224 32 img_size
tresnet_m 32
twins_pcpvt_small 32
twins_svt_small 32
vgg11_bn 32
visformer_tiny 32 img_size
vit_base_patch16_siglip_224 32 img_size depth=4
vit_srelpos_small_patch16_224 32 img_size
vit_tiny_patch16_224 32 img_size
vit_tiny_patch16_dinov3_qkvb 32
vit_tiny_r_s16_p8_224 32 img_size
vitamin_small_224 32 img_size
volo_d1_224 32 img_size
vovnet39a 32
xception41p 32
xcit_nano_12_p16_224 32
"""

# Image sizes, where 32 will not do.
TORCHVISION = {
    "alexnet": 64,
    "vgg11_bn": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "wide_resnet50_2": 32,
    "squeezenet1_1": 32,
    "densenet121": 32,
    "googlenet": 96,
    "inception_v3": 299,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "shufflenet_v2_x0_5": 32,
    "mnasnet0_5": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "regnet_y_400mf": 32,
    "convnext_tiny": 32,
    "vit_b_16": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "maxvit_t": 224,
}


@dataclass(frozen=True)
class Architecture:
    library: str
    family: str
    name: str
    make: Callable[[], tuple[nn.Module, ExampleInputs]]


def timm_architecture(name: str) -> Architecture:
    row = next(row for row in TIMM.split("\n") if row.split(" ")[0] == name)
    _, size, *rest = row.split()

    def make() -> tuple[nn.Module, ExampleInputs]:
        import timm

        options: dict[str, Any] = {"img_size": int(size)} if "img_size" in rest else {}
        options |= {key: int(value) for key, _, value in (r.partition("=") for r in rest) if value}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, num_classes=CLASSES, **options), images(int(size))

    return Architecture("timm", timm_family(name), name, make)


def timm_family(name: str) -> str:
    """The file of timm that defines the network."""
    import timm

    return str(timm.model_entrypoint(name).__module__.rpartition(".")[2])


def torchvision_architecture(name: str) -> Architecture:
    def make() -> tuple[nn.Module, ExampleInputs]:
        import torchvision

        size = TORCHVISION[name]
        options: dict[str, Any] = {"image_size": size} if name == "vit_b_16" else {}
        if name in ("googlenet", "inception_v3"):
            options = {"aux_logits": True, "init_weights": False}
        return torchvision.models.get_model(name, num_classes=CLASSES, **options), images(size)

    return Architecture("torchvision", name.partition("_")[0].rstrip("0123456789"), name, make)


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens(start: int = 0) -> torch.Tensor:
    """(2, 7); no padding."""
    return (torch.arange(start, start + 14).reshape(2, 7) * 5) % 29 + 2


_TEXT: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_VISION: dict[str, Any] = {
    **{key: _TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 32,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 1}
_T5: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2}
_T5 |= {"num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
_BART: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "max_position_embeddings": 16}
_BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
for _side in ("encoder", "decoder"):
    _BART |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 2, f"{_side}_ffn_dim": 32}
_MOE: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "num_local_experts": 4}

# Configuration class, model class, and the arguments of the former.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _TEXT),
    "bert, masked words": ("BertConfig", "BertForMaskedLM", _TEXT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _TEXT),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": 32, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
    ),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", _TEXT),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", {**_TEXT, "embedding_size": 8}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt2, two heads": ("GPT2Config", "GPT2DoubleHeadsModel", {**_GPT2, "num_labels": 1}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _TEXT),
    "llama, tied": ("LlamaConfig", "LlamaForCausalLM", {**_TEXT, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_MOE, "num_experts_per_tok": 2}),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "vit": ("ViTConfig", "ViTForImageClassification", _VISION),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": {**_TEXT}, "vision_config": {**_VISION}, "projection_dim": 8},
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        {
            **{key: _TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
            **{"num_attention_heads": 2, "intermediate_size": 32, "num_conv_pos_embeddings": 4},
            **{"num_conv_pos_embedding_groups": 2, "conv_dim": (8, 8), "conv_kernel": (8, 4)},
            **{"conv_stride": (4, 2), "mask_time_prob": 0.0, "classifier_proj_size": 8},
        },
    ),
}


def transformers_architecture(name: str) -> Architecture:
    def make() -> tuple[nn.Module, ExampleInputs]:
        import transformers

        config_class, model_class, options = TRANSFORMERS[name]
        config = getattr(transformers, config_class)(**options)
        model = getattr(transformers, model_class)(config)
        return model, _inputs(name)

    return Architecture("transformers", name.partition(",")[0], name, make)


def _inputs(name: str) -> dict[str, Any]:
    if name == "vit":
        return {"pixel_values": images(16)}
    if name == "clip":
        return {"input_ids": tokens(), "pixel_values": images(16)}
    if name == "wav2vec2":
        return {"input_values": images(16).flatten(1)}
    inputs: dict[str, Any] = {"input_ids": tokens()}
    if name in ("t5", "bart"):
        inputs["decoder_input_ids"] = tokens(3)
    if name == "gpt2, two heads":
        inputs = {
            "input_ids": tokens()[:, None].repeat(1, 2, 1),
            "mc_token_ids": tokens()[:, :2] % 7,
        }
    if name.startswith(("gpt2", "llama", "mixtral", "t5", "bart")):
        inputs["use_cache"] = False
    return inputs


def everything() -> list[Architecture]:
    """All of them, timm's first."""
    return [
        *(timm_architecture(row.split(" ")[0]) for row in TIMM.strip().split("\n")),
        *map(torchvision_architecture, TORCHVISION),
        *map(transformers_architecture, TRANSFORMERS),
    ]
