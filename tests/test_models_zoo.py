from __future__ import annotations

import importlib.util
import math
import re
import socket
import sys
from pathlib import Path

import oracle
import pytest
import torch
from modnorm_fx.models_zoo import build, data, paper
from torch import nn

from modnorm_fx.errors import ModnormError

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# the paper's nets against the paper's package


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("name", oracle.NETS)
def test_a_plain_net_computes_what_modula_computes(name: str, blocks: int) -> None:
    pair = oracle.twins(name, blocks=blocks)
    with torch.no_grad():
        theirs, ours = pair.net(pair.inputs, pair.weights), pair.plain(pair.inputs)
    assert theirs.std() > 1e-3  # not equal because all is zero
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", oracle.NETS)
def test_gradients_agree_too(name: str) -> None:
    pair = oracle.twins(name)
    pair.net(pair.inputs, pair.weights).square().mean().backward()
    pair.plain(pair.inputs).square().mean().backward()
    for atom, weight, parameter in zip(oracle.atoms(pair.net), pair.weights, pair.plain.parameters(), strict=True):
        torch.testing.assert_close(atom.scale * parameter.grad, weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", oracle.NETS)
def test_the_oracle_names_a_target_for_every_parameter(name: str) -> None:
    pair = oracle.twins(name, blocks=3)
    targets = pair.targets()
    assert list(targets) == [key for key, _ in pair.plain.named_parameters()]
    assert all(target > 0 for target in targets.values())
    assert pair.targets(2.0) == pytest.approx({key: 2 * target for key, target in targets.items()})
    weights = pair.net.initialize(device="cpu")  # the recorders are gone: modula's own normalize works again
    pair.net.normalize(weights, target_norm=1.0)


def test_the_oracle_against_targets_worked_out_by_hand() -> None:
    """ResMLP of mass 1+1+1: the trunk has sensitivity 1; initial, final and trunk take 1/3 each."""
    targets = oracle.twins("resmlp", blocks=2).targets()
    assert targets["initial.weight"] == pytest.approx(1 / 3)
    assert targets["final.weight"] == pytest.approx(1 / 3)
    # 4 weights share 1/3 equally; each is then divided by the 1/2 on its branch
    assert [targets[f"blocks.{b}.linears.{i}.weight"] for b in (0, 1) for i in (0, 1)] == pytest.approx([1 / 6] * 4)


def test_the_oracle_sees_masses() -> None:
    light, heavy = (oracle.twins("gpt", blocks_mass=mass).targets() for mass in (1.0, 10.0))
    assert heavy["blocks.0.mlp.up.weight"] > light["blocks.0.mlp.up.weight"]
    assert heavy["final.weight"] < light["final.weight"]


@pytest.mark.parametrize("name", oracle.NETS)
def test_fresh_paper_nets_have_weights_of_norm_one(name: str) -> None:
    plain = {"resmlp": paper.ResMLP, "rescnn": paper.ResCNN, "gpt": paper.GPT}[name]()
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            norm = math.sqrt(module.in_features / module.out_features) * torch.linalg.matrix_norm(module.weight, 2)
        elif isinstance(module, nn.Conv2d):
            taps = module.weight.flatten(2).permute(2, 0, 1)
            ratio = math.sqrt(module.in_channels / module.out_channels)
            norm = len(taps) * ratio * torch.linalg.matrix_norm(taps, 2)
        elif isinstance(module, nn.Embedding):
            norm = module.weight.square().mean(dim=1).sqrt()
        else:
            continue
        torch.testing.assert_close(norm, torch.ones_like(norm))


def test_a_gpt_does_not_look_ahead() -> None:
    net = paper.GPT(vocab=11, context=8, heads=2, width=8, blocks=2)
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    torch.testing.assert_close(net(tokens)[:, :5], net(changed)[:, :5])


@pytest.mark.parametrize(
    "net", [paper.GPT(), paper.ResMLP(), paper.ResCNN(width=8)], ids=lambda net: type(net).__name__
)
def test_example_inputs_fit(net: nn.Module) -> None:
    assert torch.isfinite(net(*net.example_inputs(batch=2))).all()


# build


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM"), ("bert", "BertForMaskedLM")]
    + [("vit", "ViTForImageClassification"), ("t5", "T5ForConditionalGeneration"), ("clip", "CLIPModel")]
    + [
        ("deit", "DeiTForImageClassification"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("mamba", "MambaForCausalLM"),
    ]
    # parts that stand for what has no forward of its own
    + [("bark", "BarkSemanticModel"), ("qwen2_5_omni", "Qwen2_5OmniThinkerForConditionalGeneration")]
    + [("sam3_video", "Sam3Model"), ("sam2_video", "Sam2VideoModel")],
)
def test_an_architecture_gets_the_head_of_its_task(name: str, kind: str) -> None:
    model = build(f"hf:{name}-tiny", device="meta")
    assert type(model).__name__ == kind
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_tracker_segments_a_single_frame() -> None:
    model = build("hf:sam2_video-tiny")
    outputs = model(pixel_values=torch.randn(1, 3, 128, 128))
    outputs.pred_masks.sum().backward()
    assert model.vision_encoder.neck.convs[0].weight.grad is not None
    assert all(p.grad is None for p in model.memory_attention.parameters())


def test_gpt2_is_the_124m_model_unless_told_otherwise() -> None:
    assert sum(p.numel() for p in build("hf:gpt2", device="meta").parameters()) == 124_439_808
    medium = build("hf:gpt2", layers=24, width=1024, device="meta")
    assert sum(p.numel() for p in medium.parameters()) == 354_823_168  # gpt2-medium
    assert (medium.config.n_head, medium.transformer.h[0].mlp.c_fc.weight.shape) == (16, (1024, 4096))


def test_sizes_stay_consistent_in_transformers_models() -> None:
    config = build("hf:llama", layers=3, width=1024, vocab=500, context=256, device="meta").config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 1024, 500)
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (
        8,
        128,
        2752,
    )  # 11008 / 4096 kept
    assert config.max_position_embeddings == 256
    bert = build("hf:bert", width=96, device="meta").config
    assert (bert.num_attention_heads, bert.intermediate_size) == (2, 384)
    vit = build("hf:vit", layers=2, width=64, heads=2, image_size=32, channels=1, classes=7, device="meta")
    assert vit.classifier.out_features == 7
    assert vit(torch.empty(1, 1, 32, 32, device="meta")).logits.shape == (1, 7)


def test_special_tokens_fit_a_small_vocabulary() -> None:
    config = build("hf:gpt2", vocab=65, device="meta").config
    assert config.bos_token_id == config.eos_token_id == 64
    opt = build("hf:opt-tiny", vocab=20, device="meta")
    assert opt.get_input_embeddings().num_embeddings == 20


def test_layer_kinds_follow_the_number_of_layers() -> None:
    config = build("hf:gpt_oss-tiny", layers=5, device="meta").config
    assert len(config.layer_types) == config.num_hidden_layers == 5
    assert len(set(config.layer_types)) == 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "mixtral", "t5"])
def test_tiny_models_are_tiny_and_run(name: str) -> None:
    model = build(f"hf:{name}-tiny").eval()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    tokens = torch.randint(4, 100, (2, 8))
    more = {"decoder_input_ids": tokens} if name == "t5" else {}
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens, **more).logits).all()


# architectures whose numbers must fit together in ways of their own
INTRICATE = {
    "align": {"pixel_values": (2, 3, 128, 128), "input_ids": (2, 8)},
    "blt": {"input_ids": (2, 8)},
    "d_fine": {"pixel_values": (1, 3, 64, 64)},
    "chmv2": {"pixel_values": (1, 3, 64, 64)},
    "dbrx": {"input_ids": (2, 8)},
    "deepseek_v2": {"input_ids": (2, 8)},
    "depth_anything": {"pixel_values": (1, 3, 56, 56)},
    "edgetam": {"pixel_values": (1, 3, 128, 128)},
    "efficientnet": {"pixel_values": (2, 3, 64, 64)},
    "encodec": {"input_values": (2, 1, 3840)},
    "glm4v": {"input_ids": (2, 8)},
    "hgnet_v2": {"pixel_values": (2, 3, 64, 64)},
    "mask2former": {"pixel_values": (1, 3, 64, 64)},
    "mpnet": {"input_ids": (2, 8)},
    "pp_doclayout_v3": {"pixel_values": (1, 3, 64, 64)},
    "sam2": {"pixel_values": (1, 3, 128, 128)},
    "sam3_tracker": {"pixel_values": (1, 3, 224, 224)},
    "sapiens2": {"pixel_values": (1, 3, 64, 64)},
    "superglue": {"pixel_values": (1, 2, 3, 64, 64)},
    "upernet": {"pixel_values": (1, 3, 64, 64)},
    "zamba2": {"input_ids": (2, 8)},
}


@pytest.mark.parametrize("name", INTRICATE)
def test_numbers_of_tiny_models_fit_together(name: str) -> None:
    model = build(f"hf:{name}-tiny").eval()
    assert sum(p.numel() for p in model.parameters()) < 1_500_000
    inputs = {
        argument: torch.randint(4, 100, shape) if argument == "input_ids" else torch.randn(shape)
        for argument, shape in INTRICATE[name].items()
    }
    with torch.no_grad():
        outputs = [tensor for tensor in model(**inputs).values() if isinstance(tensor, torch.Tensor)]
    assert outputs and all(torch.isfinite(tensor).all() for tensor in outputs if tensor.is_floating_point())


def parameter_kinds(model: nn.Module) -> set[str]:
    return {re.sub(r"\.\d+(?=\.)", ".N", name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "name",
    ["bailing_hybrid", "beam", "deepseek_v4", "lfm2_moe", "mllama", "qwen3_next", "qwen3_vl", "recurrent_gemma"]
    + ["grounding-dino", "electra", "mimi"],
)
def test_a_tiny_model_has_every_kind_of_layer(name: str) -> None:
    tiny, whole = (build(f"hf:{spec}", device="meta") for spec in (f"{name}-tiny", name))
    assert parameter_kinds(tiny) == parameter_kinds(whole)


@pytest.mark.parametrize("name", ["gemma4_text", "dots3_note_text", "neomme"])
def test_layers_that_differ_in_their_numbers_stay_different(name: str) -> None:
    """Transformers' `per_layer_config`: widths, heads or windows of single layers."""
    config, whole = (build(f"hf:{spec}", device="meta").config for spec in (f"{name}-tiny", name))
    assert config.num_hidden_layers < whole.num_hidden_layers and set(config.layer_types) == set(whole.layer_types)
    assert config.per_layer_attributes <= whole.per_layer_attributes != set()
    four = build(f"hf:{name}-tiny", layers=4, device="meta").config
    assert len(four.layer_types) == four.num_hidden_layers == 4


@pytest.mark.parametrize(
    "name",
    ["cohere_compass_text", "diffusion_gemma", "dots3_note", "ernie4_5_vl_moe", "fast_vlm", "fun_asr_nano", "glm5_next"]
    + ["gradium_phonon_tts", "granite4_vision", "hunyuan_v1_dense", "mimi_decoder", "ministral", "molmo2", "muse_spark"]
    + ["pocket_tts", "pp_ocrv5_server_det", "qwen4_exp_text", "edgetam", "hunyuan_vl", "step3p7", "timm_backbone"]
    + ["edgetam_video", "pp_ocrv6_medium_det", "pp_ocrv6_small_det", "qwen3_omni_moe", "uvdoc"],
)
def test_what_transformers_has_no_default_for_is_filled_in(name: str) -> None:
    assert sum(p.numel() for p in build(f"hf:{name}-tiny", device="meta").parameters()) < 20_000_000


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "beam", "dots1", "dbrx"])
def test_tiny_routers_choose(name: str) -> None:
    config = build(f"hf:{name}-tiny", device="meta").config
    config = getattr(config, "ffn_config", config)
    chosen = getattr(config, "num_experts_per_tok", None) or config.moe_top_k
    experts = [getattr(config, field, None) for field in ("num_experts", "num_local_experts", "n_routed_experts")]
    assert 0 < chosen < max(count or 0 for count in [*experts, getattr(config, "moe_num_experts", 0)])


def test_a_tiny_model_takes_sizes_that_its_class_derives_lists_from() -> None:
    config = build("hf:qwen3_next-tiny", layers=4, width=128, device="meta").config
    assert len(config.layer_types) == config.num_hidden_layers == 4 and len(set(config.layer_types)) == 2
    assert config.hidden_size == 128


def test_a_missing_library_is_named() -> None:
    if importlib.util.find_spec("natten"):
        pytest.skip("it is installed")
    with pytest.raises(ModnormError, match="requires the natten library"):
        build("hf:dinat-tiny")


def test_timm_by_name_and_size() -> None:
    resnet = build("timm:resnet18", classes=10, channels=1, image_size=64, device="meta")
    assert resnet.fc.out_features == 10
    assert resnet.default_cfg["input_size"] == (1, 64, 64)
    vit = build("timm:vit_tiny_patch16_224", layers=3, width=128, image_size=32, classes=10)
    assert (len(vit.blocks), vit.embed_dim, vit.blocks[0].attn.num_heads) == (3, 128, 2)
    assert vit(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", ["gpt", "resmlp", "rescnn"])
def test_zoo_sizes(name: str) -> None:
    model = build(f"zoo:{name}", layers=4, width=32)
    assert len(model.blocks) == 4
    assert torch.isfinite(model(*model.example_inputs())).all()
    assert all(parameter.is_meta for parameter in build(f"zoo:{name}", device="meta").parameters())


USER_FILE = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Sizes:
    width: int

def mlp(width=8, classes=3):
    return nn.Sequential(nn.Linear(Sizes(width).width, 2 * width), nn.Linear(2 * width, classes))

def nothing():
    return 42

def broken(width=1):
    raise ValueError("no luck")
"""


def test_a_function_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(USER_FILE)
    model = build(f"{file}:mlp", width=16)
    assert (model[0].in_features, model[1].out_features) == (16, 3)
    assert build(f"{file}:mlp", device="meta")[0].weight.is_meta


@pytest.mark.parametrize(
    ("spec", "sizes", "message"),
    [
        ("hf:gpt3", {}, "transformers has no architecture named 'gpt3'"),
        ("hf:gpt3", {}, "hf:gpt2"),
        ("hf:bert-base-uncased", {}, "Did you mean hf:bert?"),
        ("hf:gpt2", {"image_size": 32}, "hf:gpt2 cannot be given image_size."),
        ("hf:gpt2", {"classes": 2}, "has no classifier"),
        ("hf:bark-tiny", {"classes": 2}, "it is built as BarkSemanticModel, which has no classifier"),
        ("hf:voxtral_realtime_text", {}, "has no model class for voxtral_realtime_text, though it names one"),
        ("hf:gpt2", {"width": 100, "heads": 7}, "could not be built with width=100, heads=7"),
        ("timm:resnet81", {}, "timm has no model named 'resnet81'"),
        ("timm:resnet81", {}, "timm:resnet18"),
        ("timm:hf-hub:timm/resnet18", {}, "timm has no model named"),
        ("timm:resnet18", {"width": 3}, "timm:resnet18 cannot be given width."),
        ("timm:mixer_s16_224", {"classes": 3, "width": 64}, "timm:mixer_s16_224 cannot be given width."),
        ("timm:vit_tiny_patch16_224", {"width": 64, "heads": 5}, "could not be built with"),
        ("zoo:gtp", {}, "Did you mean zoo:gpt?"),
        ("zoo:gpt", {"classes": 3}, "zoo:gpt cannot be given classes."),
        ("zoo:gpt", {"width": 10, "heads": 3}, "A GPT of width 10 cannot have 3 heads."),
        ("gpt2", {}, "Write hf:NAME, timm:NAME, zoo:NAME or path/to/file.py:function."),
        ("hf:", {}, "does not name a model"),
        ("nowhere.py:f", {}, "There is no file nowhere.py."),
        ("zoo:gpt", {"depth": 3}, "There is no size named 'depth'."),
        ("zoo:gpt", {"layers": 0}, "The size layers=0 is not a positive integer."),
        ("{file}:mpl", {}, "Did you mean mlp?"),
        ("{file}:mlp", {"layers": 3}, "It takes width, classes."),
        ("{file}:nothing", {}, "returned a int, not an nn.Module"),
        ("{file}:broken", {}, "ValueError: no luck"),
    ],
)
def test_errors_say_what_to_do(spec: str, sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(USER_FILE)
    with pytest.raises(ModnormError) as caught:
        build(spec.format(file=file), **sizes)
    assert message in str(caught.value)


# data


def test_text_is_there_and_repeats() -> None:
    corpus, again = data.text(max_bytes=50_000), data.text(max_bytes=50_000)
    assert torch.equal(corpus.train, again.train) and corpus.vocabulary == again.vocabulary
    assert len(corpus.train) + len(corpus.val) == 50_000 and len(corpus.val) == 5_000
    assert 60 < corpus.vocab <= 128 and int(corpus.train.max()) < corpus.vocab
    assert "import" in corpus.decode(corpus.train)
    assert corpus.decode(corpus.encode("def f(x):")) == "def f(x):"


def test_text_batches_are_windows_and_their_next_tokens() -> None:
    corpus = data.text(max_bytes=20_000)
    x, y = next(corpus.batches("val", batch_size=3, context=16, seed=1))
    assert x.shape == y.shape == (3, 16) and x.dtype == y.dtype == torch.long
    assert torch.equal(x[:, 1:], y[:, :-1])
    again, _ = next(corpus.batches("val", batch_size=3, context=16, seed=1))
    other, _ = next(corpus.batches("val", batch_size=3, context=16, seed=2))
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_text_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "poem.txt"
    file.write_text("Grüße, " * 100)
    corpus = data.text(file)
    assert corpus.decode(torch.cat([corpus.train, corpus.val])) == "Grüße, " * 100
    with pytest.raises(ModnormError, match="too few for a context of 500"):
        corpus.batch("val", 1, 500)
    with pytest.raises(ModnormError, match="bytes that .*poem.txt does not"):
        corpus.encode("xyz")
    with pytest.raises(ModnormError, match="cannot be read"):
        data.text(tmp_path / "missing.txt")


def test_digits() -> None:
    pytest.importorskip("sklearn")
    digits = data.digits()
    images, labels = digits.batch("train", 32, torch.Generator().manual_seed(0))
    assert images.shape == (32, 1, 8, 8) and int(labels.max()) < digits.classes == 10
    assert digits.train[0].square().mean().item() == pytest.approx(1, rel=1e-4)
    assert len(digits.train[1]) + len(digits.val[1]) == 1797


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModnormError, match="needs scikit-learn"):
        data.digits()
