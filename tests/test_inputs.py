"""Example inputs: what is made up for each kind of model, that it runs, and what the errors tell the reader to do."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from modnorm_fx.errors import CaptureError
from modnorm_fx.inputs import example_inputs, input_names, without_cache

EXPECTED = {
    "gpt2": {"input_ids": (2, 16)},
    "bert": {"input_ids": (2, 16)},
    "t5": {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 8)},
    "vit": {"pixel_values": (2, 3, 32, 32)},
    "clip": {"input_ids": (2, 16), "pixel_values": (2, 3, 32, 32), "attention_mask": (2, 16)},
    "llava": {"input_ids": (1, 22), "pixel_values": (1, 3, 32, 32), "attention_mask": (1, 22)},
    "whisper": {"input_features": (2, 8, 40), "decoder_input_ids": (2, 8)},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_transformers(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(tiny_models, name)().eval()
    state = torch.get_rng_state()
    args, kwargs = example_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert args == ()
    assert {key: tuple(value.shape) for key, value in kwargs.items()} == EXPECTED[name]
    assert all(type(value) is Tensor and value.device.type == "cpu" for value in kwargs.values())
    with torch.no_grad():
        model(**kwargs)
    again = example_inputs(model)[1]
    assert all(torch.equal(value, again[key]) for key, value in kwargs.items())


def test_meta_models_get_real_inputs() -> None:
    with torch.device("meta"):
        model = tiny_models.gpt2()
    ((), kwargs) = example_inputs(model)
    assert type(kwargs["input_ids"]) is Tensor and kwargs["input_ids"].device.type == "cpu"


def test_ids_are_in_the_vocabulary_and_not_special() -> None:
    ids = example_inputs(tiny_models.t5())[1]["input_ids"]
    assert ids.min() >= 3 and ids.max() < 99 and ids.unique().numel() > 10


def test_images_are_as_many_tokens_as_the_model_makes_of_them() -> None:
    model = tiny_models.llava()
    kwargs = example_inputs(model)[1]
    assert (kwargs["input_ids"] == model.config.image_token_id).sum() == (32 // 8) ** 2


def test_short_position_tables() -> None:
    transformers = tiny_models.transformers
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=6, **tiny_models.TOKENS)
    assert example_inputs(transformers.GPT2LMHeadModel(config))[1]["input_ids"].shape == (2, 6)


def test_timm_models_built_for_another_size() -> None:
    (image,), kwargs = example_inputs(tiny_models.timm_vit())
    assert image.shape == (2, 3, 32, 32) and kwargs == {}


def test_timm_models_built_for_other_channels() -> None:
    model = tiny_models.timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), in_chans=1)
    (image,), _ = example_inputs(model)
    assert image.shape == (2, 1, 224, 224)


def test_noise_has_the_precision_of_the_weights() -> None:
    assert example_inputs(tiny_models.vit().bfloat16())[1]["pixel_values"].dtype is torch.bfloat16


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(
        self, left: Tensor, right: Tensor, scale: float = 1.0, *rest: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return self.linear(left + right) * scale


def test_unknown_models_are_told_how_to_pass_inputs() -> None:
    with pytest.raises(CaptureError) as caught:
        example_inputs(Pair())
    assert str(caught.value) == (
        "No example inputs are known for Pair.\n"
        "  why: it is neither a transformers model (config, main_input_name) nor a timm model (pretrained_cfg)\n"
        '  do: pass what the model takes: modnorm_fx.convert(model, kwargs={"left": left, "right": right})'
    )


def test_models_that_run_on_nothing_made_up_say_what_was_tried() -> None:
    model = tiny_models.vit()
    model.vit.embeddings.patch_embeddings.projection = nn.Conv2d(5, 32, 8, 8)
    with pytest.raises(CaptureError) as caught:
        example_inputs(model)
    assert caught.value.what == "ViTForImageClassification runs on none of the inputs that were made up for it."
    assert "\n    pixel_values: RuntimeError: " in caught.value.why
    assert 'kwargs={"pixel_values": pixel_values}' in caught.value.do


def test_names_of_inputs() -> None:
    x = torch.zeros(1)
    names = input_names(Pair(), (x, [x, {"k": x}], 2.0, x), {"mask": None})
    assert names == ["left", "right[0]", "right[1]['k']", "scale", "args[3]", "mask"]


def test_the_cache_is_only_switched_off_where_there_is_one() -> None:
    assert without_cache(tiny_models.gpt2(), {"use_cache": True}) == {"use_cache": False}
    assert without_cache(tiny_models.vit(), {}) == {}
    assert without_cache(Pair(), {}) == {}
