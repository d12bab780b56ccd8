"""Classes of transformers for the folders of this package: `AutoModelForCausalLM` reads a `PaLM` that `write_model` wrote.

Importing the package is enough, as `lightning_align.models.auto_hook` registers these classes. They are for programs
that read models of transformers, such as evaluation harnesses. Decoding recomputes the row for each token: use
`lightning_align.generate` for a cache.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

MODEL_TYPE = "lightning_align"


class LightningAlignConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """The content of the config.json of a folder of this package."""

    model_type = MODEL_TYPE

    def __init__(self, class_path: str = "", init_args: dict[str, Any] | None = None, **options: Any) -> None:
        """Set the content.

        Args:
            class_path: The class of the model.
            init_args: The arguments that the model is built from.
            **options: Settings of transformers, such as the ids of special tokens.
        """
        self.class_path, self.init_args = class_path, dict(init_args or {})
        self.vocab_size = self.init_args.get("num_tokens")
        self.hidden_size, self.num_hidden_layers = self.init_args.get("dim"), self.init_args.get("depth")
        self.max_position_embeddings = self.init_args.get("max_seq_len")
        # A folder has no cache, and an output layer that is tied has no second name.
        super().__init__(**{"use_cache": False, "tie_word_embeddings": False, **options})


class LightningAlignForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # as above
    """A `PaLM` of this package, as a model of transformers."""

    config_class = LightningAlignConfig
    main_input_name = "input_ids"
    _supports_cache_class = False

    def __init__(self, config: LightningAlignConfig, model: nn.Module | None = None) -> None:
        """Build the model.

        Args:
            config: The configuration.
            model: The model, or None to build one with random weights.

        Raises:
            ValueError: If the configuration is of another class than `PaLM`. No other class is built from a folder.
        """
        super().__init__(config)
        from lightning_align.models.palm import PaLM

        if config.class_path.rpartition(".")[2] != "PaLM" or not config.class_path.startswith("lightning_align."):
            raise ValueError(
                f"`class_path` must be lightning_align.models.palm.PaLM, but got {config.class_path!r}. Read other models with "
                "lightning_align.models.formats.read_model."
            )
        self.model = PaLM(**config.init_args) if model is None else model

    @classmethod
    def from_pretrained(cls, name: str, *_: Any, config: LightningAlignConfig | None = None, **options: Any) -> Any:
        """Read a folder.

        Args:
            name: The folder.
            config: The configuration. Default is that of the folder.
            **options: The options of transformers. ``dtype``, ``device_map`` (a device) and ``output_loading_info`` are used.
        """
        from lightning_align.models.formats import CONFIG, read_model

        if config is None:
            config = LightningAlignConfig(**json.loads((Path(name) / CONFIG).read_text(encoding="utf-8")))
        assert isinstance(config, LightningAlignConfig)
        with torch.device("meta"):
            cls(config)  # checks the class before it is built
        model = cls(config, read_model(name))
        dtype = options.get("dtype") or options.get("torch_dtype")
        if dtype not in (None, "auto"):
            model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        device = options.get("device_map")
        if isinstance(device, dict):
            device = device.get("")
        if device not in (None, "auto"):
            model = model.to(device)
        model.eval()
        nothing: dict[str, list[str]] = {
            kind: [] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        }
        return (model, nothing) if options.get("output_loading_info") else model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Compute logits (B, N, V) of tokens (B, N), and the mean loss of ``labels`` (B, N), in which -100 is ignored.

        Padding, at either side, is false in ``attention_mask`` (B, N).
        """
        mask = None if attention_mask is None else attention_mask.bool()
        model: Any = self.model
        logits = model.head.logits(model.hidden(input_ids, mask=mask))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return the whole row for each step, because there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        embedding: nn.Module = self.model.token_emb  # type: ignore[assignment]
        return embedding


def register_config() -> None:
    """Register the configuration with `AutoConfig`."""
    AutoConfig.register(MODEL_TYPE, LightningAlignConfig, exist_ok=True)


def register_model() -> None:
    """Register the model with `AutoModelForCausalLM`."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.register(LightningAlignConfig, LightningAlignForCausalLM, exist_ok=True)
