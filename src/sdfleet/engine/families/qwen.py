"""What the families that read prompts with Qwen3 share: FLUX.2 klein and Z-Image."""

from __future__ import annotations

from functools import partial

from sdfleet.domain import Drawing
from sdfleet.engine.conditioning import Conditioning, Room
from sdfleet.engine.families.base import LatentFamily, PromptPair, adapters_of
from sdfleet.engine.prompt_cache import PromptKey
from sdfleet.engine.qwen_encoder import (
    QWEN_MAX_LENGTH,
    QwenEncoder,
    bracket_warnings,
    encode_qwen,
    padded_length,
    plain_prompt,
    qwen_length,
)


class QwenFamily(LatentFamily):
    """A family whose only text encoder is a Qwen3.

    layers: which hidden states it is trained on. thinks: see QwenEncoder.
    pads: whether the denoiser is given padding too; then both prompts of a picture are filled up to one length.
    """

    even_sigmas = True
    layers: tuple[int, ...]
    thinks: bool
    pads: bool

    def check(self, drawing: Drawing) -> None:
        """As the base; and a prompt with weights is refused."""
        super().check(drawing)
        for text in self._texts(drawing):
            plain_prompt(text)

    def encode(self, drawing: Drawing) -> PromptPair:
        """Qwen3's states of the prompt, and of the negative one where the picture is guided."""
        qwen = QwenEncoder(
            tokenizer=self.components.use("tokenizer"),
            module=self.components.use("text_encoder"),
            thinks=self.thinks,
            max_length=self._max_length(),
        )
        sources = self._texts(drawing)
        texts = [plain_prompt(source) for source in sources]
        longest = max(qwen_length(qwen, text) for text in texts)
        length = padded_length(longest) if self.pads else None
        encoded = []
        for text in texts:
            key = PromptKey(
                checkpoint=str(self.components.folder),
                encoder=self.name,
                text=text,
                room=Room(qwen_length=length or 0),
                adapters=adapters_of(drawing),
            )
            encoded.append(self.prompts.conditioning(key, partial(self._conditioning, qwen, text, length)))
        warnings = [warning for source in sources for warning in bracket_warnings(source)]
        return PromptPair(
            positive=encoded[0],
            negative=encoded[1] if len(encoded) > 1 else None,
            tokens=encoded[0].tokens,
            warnings=(*dict.fromkeys(warnings), *self.ignored(drawing)),
        )

    def ignored(self, drawing: Drawing) -> tuple[str, ...]:
        """What of a drawing has no effect, as sentences."""
        if drawing.negative_prompt and not self.is_guided(drawing):
            return ("the negative prompt has no effect at guidance 1 or less",)
        return ()

    def _texts(self, drawing: Drawing) -> list[str]:
        return [drawing.prompt, drawing.negative_prompt] if self.is_guided(drawing) else [drawing.prompt]

    def _conditioning(self, qwen: QwenEncoder, text: str, length: int | None) -> Conditioning:
        states, counted = encode_qwen(qwen, text, layers=self.layers, length=length)
        return Conditioning(states=states, pooled=None, tokens=(counted,))

    def _max_length(self) -> int:
        config = self.components.config("text_encoder")
        return min(QWEN_MAX_LENGTH, int(config.get("max_position_embeddings", QWEN_MAX_LENGTH)))
