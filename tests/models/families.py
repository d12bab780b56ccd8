"""Families of transformers as random tiny configurations: those that work, and those that are refused with a reason."""

import copy
import functools
from typing import Any

import torch

from lightning_align.models.head_probe import probe_head
from lightning_align.models.pretrained import PretrainedLM

V = 260
"""The vocabulary size, of at least the 259 ids of `ByteTokenizer`."""
IDS: dict[str, Any] = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
WINDOW = {**HEADS, "sliding_window": 6}
EXPERTS = {**HEADS, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT: dict[str, Any] = {
    **{name: value for name, value in SHARED.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
GPT2 = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
BART: dict[str, Any] = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 96,
}

TEXT: dict[str, dict[str, Any]] = {
    "afmoe": {**EXPERTS, "num_dense_layers": 1, "sliding_window": 6},
    "apertus": GROUPED,
    "arcee": GROUPED,
    "aria_text": {**HEADS, "moe_num_experts": 4, "moe_topk": 2},
    "bamba": {**GROUPED, **MAMBA, "attn_layer_indices": [1]},
    "bart": BART,
    "bert": {**SIZES, "is_decoder": True},
    "biogpt": SIZES,
    "bitnet": GROUPED,
    "bloom": {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {**GPT2, "rotary_dim": 4},
    "cohere": {**GROUPED, "logit_scale": 0.3},
    "cohere2": {**WINDOW, "logit_scale": 0.3},
    "ctrl": {**GPT2, "dff": 48},
    "cwm": WINDOW,
    "dbrx": {
        **IDS,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 96,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "diffllama": GROUPED,
    "doge": GROUPED,
    "dots1": SHARED,
    "electra": {**SIZES, "embedding_size": 32, "is_decoder": True},
    "ernie4_5": HEADS,
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone4": WINDOW,
    "falcon": {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon_h1": {**GROUPED, **MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32},
    "falcon_mamba": {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "flex_olmo": EXPERTS,
    "gemma": HEADS,
    "gemma2": {**WINDOW, "final_logit_softcapping": 0.4},
    "gemma3_text": WINDOW,
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": SHARED,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {**IDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": SIZES,
    "gpt_oss": {**EXPERTS, "sliding_window": 6},
    "gptj": {**GPT2, "rotary_dim": 4},
    "granite": {**GROUPED, "logits_scaling": 4.0},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 16},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2},
    "jamba": {
        **GROUPED,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "jetmoe": {**EXPERTS, "kv_channels": 8},
    "lfm2": {**GROUPED, "full_attn_idxs": [1]},
    "llama": GROUPED,
    "llama4_text": {
        **EXPERTS,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 1,
    },
    "mamba": {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "ministral": WINDOW,
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "modernbert-decoder": {**SIZES, "local_attention": 6},
    "mpt": {**IDS, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 96, "expansion_ratio": 2},
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": EXPERTS,
    "openai-gpt": GPT2,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": SIZES,
    "phi": SIZES,
    "phi3": {**GROUPED, "sliding_window": 6},
    "phimoe": EXPERTS,
    "qwen2": GROUPED,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {**HEADS, "tie_word_embeddings": True},
    "qwen3_5_text": {**HEADS, **DELTA, **HYBRID},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **DELTA, **HYBRID, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {**GROUPED, "lru_width": 32, "attention_window_size": 6, "block_types": ["recurrent", "attention"]},
    "rwkv": {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 96},
    "seed_oss": HEADS,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "vaultgemma": WINDOW,
    "xglm": {**IDS, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 96},
    "xlstm": {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 8},
}

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
PATCHES: dict[str, Any] = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "mlp_ratio": 1,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
MARKS = {"image_token_id": 257, "video_token_id": 258, "vision_start_token_id": 256}
CLIP, SIGLIP = {**VISION, "model_type": "clip_vision_model"}, {**VISION, "model_type": "siglip_vision_model"}
IMAGES_AND_TEXT: dict[str, dict[str, Any]] = {
    "aya_vision": {"text_config": {**WINDOW, "model_type": "cohere2"}, "vision_config": SIGLIP, "image_token_index": 257},
    "gemma3": {"text_config": WINDOW, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 257},
    "glm4v": {"text_config": {**HEADS, **ROTARY}, "vision_config": {**PATCHES, "image_size": 16}, **MARKS},
    "idefics3": {"text_config": {**GROUPED, "model_type": "llama"}, "vision_config": VISION, **MARKS},
    "internvl": {
        "text_config": {**GROUPED, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        **MARKS,
    },
    "lfm2_vl": {
        "text_config": {**GROUPED, "model_type": "lfm2", "full_attn_idxs": [1]},
        "vision_config": {**VISION, "model_type": "siglip2_vision_model", "num_patches": 4},
        "projector_hidden_size": 32,
        **MARKS,
    },
    "llama4": {"text_config": TEXT["llama4_text"], "vision_config": VISION},
    "llava": {"text_config": {**GROUPED, "model_type": "llama"}, "vision_config": CLIP, "image_token_index": 257},
    "llava_onevision": {
        "text_config": {**GROUPED, "model_type": "qwen2"},
        "vision_config": SIGLIP,
        "image_grid_pinpoints": [[16, 16]],
        "image_token_index": 257,
    },
    "mistral3": {
        "text_config": {**HEADS, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral"},
        "image_token_index": 257,
    },
    "qwen2_vl": {"text_config": {**GROUPED, **ROTARY}, "vision_config": PATCHES, **MARKS},
    "qwen2_5_vl": {"text_config": {**GROUPED, **ROTARY}, "vision_config": PATCHES, **MARKS},
    "qwen3_vl": {"text_config": {**HEADS, **ROTARY}, "vision_config": PATCHES, **MARKS},
    "qwen3_vl_moe": {"text_config": {**EXPERTS, **ROTARY}, "vision_config": PATCHES, **MARKS},
    "smolvlm": {"text_config": {**GROUPED, "model_type": "llama"}, "vision_config": VISION, **MARKS},
}
"""Classes of images and text. Text goes through their text model."""
FAMILIES = {**TEXT, **IMAGES_AND_TEXT}

NOT_CAUSAL = r"must be causal, but \w+ is not: if the last token of a row changes"
DECODER = NOT_CAUSAL + r".*Set `config: \{is_decoder: true\}`"
TWO = "encoder-decoder, whose prompts and responses have different networks"
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (DECODER, SIZES),
    "camembert": (DECODER, SIZES),
    "data2vec-text": (DECODER, SIZES),
    "electra": (DECODER, {**SIZES, "embedding_size": 32}),
    "megatron-bert": (DECODER, SIZES),
    "roberta": (DECODER, SIZES),
    "roformer": (DECODER, {**SIZES, "embedding_size": 32}),
    "xlm-roberta": (DECODER, SIZES),
    "gemma3_text": (NOT_CAUSAL, {**WINDOW, "use_bidirectional_attention": True}),
    "xlnet": (NOT_CAUSAL, {**IDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "xlm": (NOT_CAUSAL, {**IDS, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1, "n_words": V}),
    "paligemma": (NOT_CAUSAL, {"text_config": {**HEADS, "model_type": "gemma"}, "vision_config": SIGLIP, "projection_dim": 32}),
    "t5": (TWO, {**IDS, "d_model": 32}),
    "florence2": (TWO, {}),
    "clip": ("model_type 'clip' does not give one", {}),
    "vit": ("model_type 'vit' does not give one", {}),
    "no-such-family": ("model_type 'no-such-family' does not give one", {}),
    "kosmos-2": (
        "fails without other inputs, such as images",
        {
            "text_config": {**IDS, "embed_dim": 32, "layers": 2, "ffn_dim": 32, "attention_heads": 4},
            "vision_config": VISION,
            "latent_query_num": 2,
        },
    ),
}
"""Families that are refused, each with the reason and its configuration."""


@functools.cache
def _built(family: str) -> PretrainedLM:
    torch.manual_seed(0)
    model = PretrainedLM(config={"model_type": family, **FAMILIES[family]})
    with torch.no_grad():  # initial logits are near 0, where most errors would be too small to see
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    model.take_probe(probe_head(model))
    return model


def build(family: str) -> PretrainedLM:
    """Return a model of a family in evaluation mode, with logits that are not all small."""
    return copy.deepcopy(_built(family))
