"""Diffusion models as modules: a denoiser of diffusers, its text encoder, its noise schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from zoo.diffusion.data import TEMPLATES, WORDS
from zoo.diffusion.plan import Plan
from zoo.diffusion.pruned import PrunedUNet2DConditionModel, plan_of
from zoo.errors import ConfigError

SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
TOKENS = 10
PREDICTIONS = ("epsilon", "v_prediction")


def vocabulary() -> list[str]:
    """The words of the captions, after the special tokens."""
    words = {word for template in TEMPLATES for word in template.replace("{}", "").split()}
    return [*SPECIAL, *sorted(words), *WORDS]


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; unknown words share one."""
    ids = {word: index for index, word in enumerate(words)}
    if missing := [word for word in SPECIAL if word not in ids]:
        raise ConfigError(f"the vocabulary lacks {missing[0]!r}")
    inner = Tokenizer(WordLevel(ids, unk_token="<unknown>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(word, ids[word]) for word in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=TOKENS,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
    )


class TextToImage(nn.Module):
    """A pixel-space text-to-image model: CLIP text encoder, conditional UNet, DDIM noise schedule.

    Args:
        side: height and width of the images.
        channels: of the images.
        widths: channels of the UNet's levels.
        attention: which levels have attention, one flag per level.
        text_width, text_layers: of the text encoder.
        heads: of every attention.
        words: the vocabulary; by default that of the captions of `zoo.diffusion.data`.
        pruning_plan: what was cut from the UNet, see `zoo.diffusion.plan.Plan`.
        prediction: what the UNet predicts, one of `PREDICTIONS`; the scheduler's `prediction_type`.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(
        self,
        side: int = 16,
        channels: int = 1,
        widths: Sequence[int] = (32, 64, 64),
        attention: Sequence[bool] = (False, True, True),
        text_width: int = 64,
        text_layers: int = 3,
        heads: int = 4,
        words: Sequence[str] | None = None,
        pruning_plan: Mapping[str, Any] | None = None,
        prediction: str = "epsilon",
    ) -> None:
        super().__init__()
        self._words = list(words) if words is not None else vocabulary()
        self._arguments = {
            "side": side,
            "channels": channels,
            "widths": list(widths),
            "attention": list(attention),
            "text_width": text_width,
            "text_layers": text_layers,
            "heads": heads,
            "words": self._words,
        }
        self.tokenizer = make_tokenizer(self._words)
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self._words),
                hidden_size=text_width,
                intermediate_size=4 * text_width,
                num_hidden_layers=text_layers,
                num_attention_heads=heads,
                max_position_embeddings=TOKENS,
                projection_dim=text_width,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        down = ["CrossAttnDownBlock2D" if flag else "DownBlock2D" for flag in attention]
        up = ["CrossAttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(attention)]
        self.unet = PrunedUNet2DConditionModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=tuple(widths),
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            norm_num_groups=8,
            cross_attention_dim=text_width,
            attention_head_dim=heads,
            pruning_plan=dict(pruning_plan) if pruning_plan is not None else None,
        )
        self.scheduler = DDIMScheduler(
            num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=False
        )
        self.predict(prediction)

    def predict(self, prediction: str) -> None:
        """Let the UNet's output count as another prediction, in training and in sampling.

        Raises:
            ConfigError: none of `PREDICTIONS`.
        """
        if prediction not in PREDICTIONS:
            raise ConfigError(f"prediction is one of {', '.join(PREDICTIONS)}; received {prediction!r}")
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config, prediction_type=prediction)

    @property
    def prediction(self) -> str:
        """What the UNet predicts, one of `PREDICTIONS`."""
        return str(self.scheduler.config.prediction_type)

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts the noise or the velocity."""
        return self.unet

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        side = int(self._arguments["side"])  # type: ignore[call-overload]
        return int(self._arguments["channels"]), side, side  # type: ignore[call-overload]

    def current_arguments(self) -> dict[str, Any]:
        """The arguments that build this network as it is now, for the card."""
        arguments, plan = dict(self._arguments), plan_of(self.unet)
        if plan is not None:
            arguments["pruning_plan"] = plan.to_dict()
        if self.prediction != "epsilon":
            arguments["prediction"] = self.prediction
        return arguments

    def cut(self, plan: Plan) -> None:
        """Cut the UNet in place, see `zoo.diffusion.pruned.prune`."""
        from zoo.diffusion.pruned import prune

        prune(self.unet, plan)

    def tokenise(self, texts: Sequence[str]) -> Int[Tensor, "n tokens"]:
        """Token ids of captions.

        Raises:
            ConfigError: a caption longer than the text encoder reads.
        """
        long = next((t for t in texts if len(t.split()) > TOKENS - 2), None)
        if long is not None:
            raise ConfigError(
                f"a prompt may have {TOKENS - 2} words; {long!r} has {len(long.split())}. Shorten it."
            )
        ids = self.tokenizer(
            list(texts), padding="max_length", max_length=TOKENS, return_tensors="pt"
        ).input_ids
        return torch.as_tensor(ids)

    def encode(self, ids: Int[Tensor, "n tokens"]) -> Float[Tensor, "n tokens width"]:
        """What the UNet attends to."""
        states: Tensor = self.text_encoder(ids).last_hidden_state
        return states

    def denoise(
        self, x: Float[Tensor, "n C H W"], times: Tensor, condition: Float[Tensor, "n tokens width"]
    ) -> Float[Tensor, "n C H W"]:
        """The prediction at noisy images, given the encoded captions."""
        out: Tensor = self.unet(x, times, encoder_hidden_states=condition).sample
        return out

    def forward(
        self, x: Float[Tensor, "n C H W"], times: Int[Tensor, " n"], ids: Int[Tensor, "n tokens"]
    ) -> Float[Tensor, "n C H W"]:
        """The prediction at noisy images, given the token ids of their captions."""
        return self.denoise(x, times, self.encode(ids))

    def decoded(self, made: Float[Tensor, "n C H W"]) -> Float[Tensor, "n C H W"]:
        """What is to be seen of sampled values, in [-1, 1]: here they are the pixels."""
        return made

    def pipeline(self) -> Any:
        """The same parts as a `DiffusionPipeline`, which shares the weights."""
        from zoo.diffusion.pipelines import TextToImagePipeline

        return TextToImagePipeline(self.text_encoder, self.tokenizer, self.unet, self.scheduler)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextToImage:
        copy = type(self)(**self.current_arguments())
        copy.load_state_dict(self.state_dict())
        copy.to(next(self.parameters())).train(self.training)
        memo[id(self)] = copy
        return copy


def denoising_target(
    scheduler: Any,
    images: Float[Tensor, "n C H W"],
    noise: Float[Tensor, "n C H W"],
    times: Int[Tensor, " n"],
) -> Float[Tensor, "n C H W"]:
    """What a network should predict of noisy images: the scheduler's `prediction_type` decides.

    With x = alpha images + sigma noise that is the noise (`epsilon`), or the velocity alpha noise - sigma
    images (`v_prediction`; Salimans and Ho, ICLR 2022).

    Raises:
        ConfigError: another `prediction_type`.
    """
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise ConfigError(f"prediction_type is one of {', '.join(PREDICTIONS)}; received {prediction!r}")
    if prediction == "epsilon":
        return noise
    velocity: Tensor = scheduler.get_velocity(images, noise, times)
    return velocity


def denoising_loss(model: nn.Module, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Mean squared error of the prediction on a batch (images, noise, time steps, token ids)."""
    images, noise, times, ids = batch
    scheduler: Any = getattr(model, "module", model).scheduler
    made = model(scheduler.add_noise(images, noise, times), times, ids)
    return F.mse_loss(made, denoising_target(scheduler, images, noise, times))
