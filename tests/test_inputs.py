"""Example inputs: what is made up for each kind of model, that it runs, and what the errors tell the reader to do."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from modnorm_fx.capture import capture
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


# --- parts that only further arguments reach --------------------------------------------------------------------------


def shapes(model: nn.Module, unused: str = "nothing") -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs, which reach every parameter but those of the part that is named."""
    _, kwargs = example_inputs(model)
    captured = capture(model, None, kwargs)
    assert all(name.startswith(unused) for name in captured.unused)
    return {name: tuple(value.shape) for name, value in kwargs.items()}


def test_time_series_reach_back_to_the_longest_lag() -> None:
    transformers = tiny_models.transformers
    config = transformers.TimeSeriesTransformerConfig(
        prediction_length=4,
        context_length=6,
        lags_sequence=[1, 3],
        num_time_features=2,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    assert shapes(transformers.TimeSeriesTransformerModel(config)) == {
        "past_values": (2, 9),
        "past_time_features": (2, 9, 2),
        "past_observed_mask": (2, 9),
        "future_values": (2, 4),
        "future_time_features": (2, 4, 2),
    }


def test_a_decoder_is_given_what_its_cross_attention_attends_to() -> None:
    transformers = tiny_models.transformers
    config = transformers.TrOCRConfig(
        vocab_size=99,
        d_model=8,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=8,
        cross_attention_hidden_size=6,
    )
    assert shapes(transformers.TrOCRForCausalLM(config)) == {"input_ids": (2, 16), "encoder_hidden_states": (2, 16, 6)}


def test_entities_beside_a_text() -> None:
    transformers = tiny_models.transformers
    config = transformers.LukeConfig(
        vocab_size=99,
        entity_vocab_size=9,
        hidden_size=8,
        entity_emb_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=40,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    assert shapes(transformers.LukeForMaskedLM(config), "luke.pooler") == {
        "input_ids": (2, 16),
        "entity_ids": (2, 6),
        "entity_position_ids": (2, 6, 30),
    }


def test_regions_that_the_configuration_asks_for() -> None:
    transformers = tiny_models.transformers
    config = transformers.LxmertConfig(
        vocab_size=99,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=8,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=5,
        visual_pos_dim=4,
    )
    _, kwargs = example_inputs(transformers.LxmertModel(config))
    assert {name: tuple(value.shape) for name, value in kwargs.items()} == {
        "input_ids": (2, 16),
        "visual_feats": (2, 6, 5),
        "visual_pos": (2, 6, 4),
    }


def test_codecs_take_an_axis_of_channels() -> None:
    transformers = tiny_models.transformers
    config = transformers.DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=16,
        downsampling_ratios=[2, 2],
        upsampling_ratios=[2, 2],
        hidden_size=16,
    )
    _, kwargs = example_inputs(transformers.DacModel(config))
    assert {name: tuple(value.shape) for name, value in kwargs.items()} == {"input_values": (2, 1, 3840)}


def test_a_mask_is_as_long_as_the_spectrogram() -> None:
    transformers = tiny_models.transformers
    config = transformers.AudioFlamingo3EncoderConfig(
        num_mel_bins=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.max_source_positions = 20
    assert shapes(transformers.AudioFlamingo3Encoder(config)) == {
        "input_features": (2, 6, 40),
        "input_features_mask": (2, 40),
    }


def test_a_querying_transformer_is_given_what_it_asks() -> None:
    transformers = tiny_models.transformers
    config = transformers.Blip2QFormerConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, encoder_hidden_size=6
    )
    assert shapes(transformers.Blip2QFormerModel(config)) == {
        "query_embeds": (2, 8, 8),
        "encoder_hidden_states": (2, 16, 6),
    }


class OneText(nn.Module):
    """Takes one text at a time."""

    main_input_name = "input_ids"

    class Config:
        model_type, vocab_size = "one", 20

        def to_dict(self) -> dict[str, int]:
            return {}

    def __init__(self) -> None:
        super().__init__()
        self.config, self.embed = self.Config(), nn.Embedding(20, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids).view(1, 16, 4)


def test_models_that_take_one_example_at_a_time() -> None:
    assert shapes(OneText()) == {"input_ids": (1, 16)}


def test_a_failure_on_one_example_is_not_listed_beside_that_on_two() -> None:
    model = OneText()
    model.embed = nn.Embedding(20, 5)
    with pytest.raises(CaptureError) as caught:
        example_inputs(model)
    assert caught.value.why.count("RuntimeError") == 1


def test_pairs_of_arguments_are_dropped_where_they_add_nothing() -> None:
    """token_type_ids have a maker and are known to BERT, whose parameters are all reached without them."""
    assert list(example_inputs(tiny_models.bert())[1]) == ["input_ids"]


def test_images_and_sound_in_one_text() -> None:
    """Both towers are reached; the text holds as many tokens of each kind as there are features."""

    class Config:
        model_type, image_token_id, audio_token_id, hidden_size = "both", 7, 8, 4
        image_size, num_channels, num_mel_bins, vocab_size = 6, 3, 5, 20

        def to_dict(self) -> dict[str, int]:
            return {"image_token_id": 7, "audio_token_id": 8}

    class Both(nn.Module):
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.embed, self.image, self.audio = nn.Embedding(20, 4), nn.Conv2d(3, 4, 3, 3), nn.Linear(5, 4)

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return self.image(pixel_values).flatten(2).transpose(1, 2)

        def get_audio_features(self, input_features: Tensor) -> Tensor:
            return self.audio(input_features)

        def forward(
            self, input_ids: Tensor, pixel_values: Tensor | None = None, input_features: Tensor | None = None
        ) -> Tensor:
            x = self.embed(input_ids)
            for token, value, features in (
                (7, pixel_values, self.get_image_features),
                (8, input_features, self.get_audio_features),
            ):
                if value is not None:
                    x = x.masked_scatter((input_ids == token)[..., None].expand_as(x), features(value))
            return x

    _, kwargs = example_inputs(Both())
    assert {name: tuple(value.shape) for name, value in kwargs.items()} == {
        "input_ids": (1, 3 + 4 + 3 + 64 + 3),
        "pixel_values": (1, 3, 6, 6),
        "input_features": (1, 64, 5),
    }
    assert (kwargs["input_ids"] == 7).sum() == 4 and (kwargs["input_ids"] == 8).sum() == 64
