"""Aliases of what a model and its adapter are made of."""

from __future__ import annotations

from qpref.aliases.alias import Alias

REFERENCE_MOVES = "layers that are trained in full stay changed with the adapters off, so the reference would move"
BASE_CHANGES = "the base would change, and with it the reference"

MODEL = (
    Alias(
        ours="model.base",
        trl="model_name_or_path",
        axolotl="base_model",
        llamafactory="model_name_or_path",
        others="model_name model model_id pretrained_model_name_or_path",
    ),
    Alias(ours="model.revision", trl="model_revision", axolotl="revision_of_model", llamafactory="model_revision"),
    Alias(
        ours="model.tokenizer",
        trl="tokenizer_name_or_path",
        axolotl="tokenizer_config",
        others="tokenizer_path tokenizer_name",
    ),
    Alias(
        ours="model.quantization",
        why='"nf4" is 4 bits, "none" keeps the base in `dtype`',
        trl="load_in_4bit",
        axolotl="load_in_4bit",
        llamafactory="quantization_bit",
        others="quant_bits use_4bit bits",
    ),
    Alias(
        ours=None,
        why='a base is in NF4 (quantization = "nf4") or in its dtype ("none"), not in 8 bits',
        trl="load_in_8bit",
        axolotl="load_in_8bit",
    ),
    Alias(
        ours=None,
        why="4-bit bases are NF4, or what bitsandbytes has quantized already",
        trl="bnb_4bit_quant_type",
        axolotl="gptq bnb_config_kwargs",
        llamafactory="quantization_type quantization_method",
        others="quant_method",
    ),
    Alias(
        ours="model.double_quantization",
        trl="use_bnb_nested_quant",
        llamafactory="double_quantization",
        others="bnb_4bit_use_double_quant",
    ),
    Alias(
        ours="model.dtype",
        why='"bf16", "fp16" or "float32"; adapters, sums and losses are float32 under each',
        trl="dtype torch_dtype bf16 fp16",
        axolotl="bf16 fp16 bfloat16 float16 float32",
        llamafactory="bf16 fp16 pure_bf16",
        others="bnb_4bit_compute_dtype compute_dtype",
    ),
    Alias(
        ours="model.device",
        trl="use_cpu no_cuda",
        axolotl="device",
        llamafactory="use_cpu",
        why='"auto", "cpu" or "cuda"',
    ),
    Alias(
        ours="model.memory",
        axolotl="gpu_memory_limit",
        why='memory of the run, such as "20GiB"',
        others="gpu_memory_utilization max_memory",
    ),
    Alias(
        ours=None,
        why="code of a model's repository is never run; models are those of transformers",
        trl="trust_remote_code",
        axolotl="trust_remote_code",
        llamafactory="trust_remote_code",
    ),
    Alias(
        ours=None,
        why="attention is chosen for the device, and compared with the model's own on the first batch",
        trl="attn_implementation",
        axolotl="flash_attention sdp_attention xformers_attention flex_attention eager_attention attn_implementation "
        "s2_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp",
        llamafactory="flash_attn shift_attn",
        others="attn_impl use_flash_attention_2",
        is_lost=False,
    ),
    Alias(
        ours=None,
        why="layers have their own fused forms; Liger's and Unsloth's kernels aren't used",
        trl="use_liger_kernel use_liger_loss torch_compile",
        axolotl="liger_rope liger_rms_norm liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv "
        "unsloth_lora_o unsloth_rms_norm unsloth_rope plugins torch_compile",
        llamafactory="enable_liger_kernel use_unsloth use_unsloth_gc",
        is_lost=False,
    ),
    Alias(
        ours=None,
        why="it follows from the model's own config",
        axolotl="model_type tokenizer_type is_llama_derived_model is_mistral_derived_model is_qwen_derived_model "
        "is_falcon_derived_model tokenizer_use_fast overrides_of_model_config",
        llamafactory="use_fast_tokenizer",
        is_lost=False,
    ),
    Alias(
        ours=None,
        why="tokens aren't added to the vocabulary: their embeddings would have to be trained in full",
        axolotl="special_tokens tokens added_tokens_overrides resize_token_embeddings_to_32x",
        llamafactory="add_tokens add_special_tokens resize_vocab new_special_tokens_config",
        trl="pad_token eos_token",
        others="new_special_tokens",
    ),
    Alias(
        ours=None,
        why="positions are the base's own",
        axolotl="rope_scaling use_pose",
        llamafactory="rope_scaling",
    ),
    Alias(
        ours=None,
        why="keyword arguments of from_pretrained have no equal; [model] has what can be chosen",
        trl="model_init_kwargs ref_model_init_kwargs bnb_4bit_quant_storage",
        others="model_kwargs",
    ),
    Alias(
        ours=None,
        why="the experts' router is frozen, so its loss would train nothing",
        trl="router_aux_loss_coef",
        llamafactory="moe_aux_loss_coef",
        is_lost=False,
    ),
)

ADAPTER = (
    Alias(
        ours="adapter",
        why="training is always LoRA on a frozen base",
        trl="use_peft",
        axolotl="adapter",
        llamafactory="finetuning_type",
        others="train_type tuner_type peft_type",
        is_lost=False,
    ),
    Alias(ours="adapter.rank", trl="lora_r", axolotl="lora_r", llamafactory="lora_rank", others="r lora_dim"),
    Alias(ours="adapter.alpha", trl="lora_alpha", axolotl="lora_alpha", llamafactory="lora_alpha"),
    Alias(ours="adapter.dropout", trl="lora_dropout", axolotl="lora_dropout", llamafactory="lora_dropout"),
    Alias(
        ours="adapter.targets",
        why='"all-linear", or a list of names',
        trl="lora_target_modules",
        axolotl="lora_target_modules lora_target_linear",
        llamafactory="lora_target",
        others="target_modules",
    ),
    Alias(
        ours="adapter.experts",
        why="true adapts a mixture's fused experts",
        trl="lora_target_parameters",
        axolotl="lora_target_parameters",
        others="target_parameters",
    ),
    Alias(
        ours="adapter.rslora",
        trl="use_rslora",
        axolotl="peft_use_rslora",
        llamafactory="use_rslora",
    ),
    Alias(
        ours="adapter.init",
        why="inits that are computed from the base start away from it, so there they have no equal",
        axolotl="peft_init_lora_weights",
        llamafactory="pissa_init",
        others="init_lora_weights init_weights",
    ),
    Alias(
        ours="adapter.start",
        why="the adapter that training starts from is also the reference",
        axolotl="lora_model_dir",
        llamafactory="adapter_name_or_path",
        others="adapters resume_from_adapter",
    ),
    Alias(
        ours=None,
        why="DoRA rescales whole columns of the base, which folds into no delta on a 4-bit base",
        trl="use_dora",
        axolotl="peft_use_dora",
        llamafactory="use_dora",
        others="dora",
    ),
    Alias(
        ours=None,
        why=REFERENCE_MOVES,
        trl="lora_modules_to_save",
        axolotl="lora_modules_to_save unfrozen_parameters peft_trainable_token_indices",
        llamafactory="additional_target freeze_trainable_layers freeze_trainable_modules freeze_extra_modules",
        others="modules_to_save trainable_token_indices",
    ),
    Alias(
        ours=None,
        why="all layers of the text model are adapted, or those named in targets",
        axolotl="peft_layers_to_transform peft_layers_pattern peft_layer_replication",
        others="layers_to_transform",
    ),
    Alias(
        ours=None,
        why=BASE_CHANGES,
        axolotl="loftq_config relora relora_prune_ratio",
        llamafactory="use_llama_pro mixture_of_depths train_from_scratch",
    ),
    Alias(
        ours=None,
        why="all adapter weights have one learning rate",
        axolotl="loraplus_lr_ratio loraplus_lr_embedding lr_groups embedding_lr embedding_lr_scale",
        llamafactory="loraplus_lr_ratio loraplus_lr_embedding",
        others="lorap_lr_ratio",
    ),
    Alias(
        ours=None,
        why="the adapter is a causal language model's",
        trl="lora_task_type",
        axolotl="lora_fan_in_fan_out lora_on_cpu peft_autocast_adapter_dtype",
        llamafactory="create_new_adapter",
        is_lost=False,
    ),
)
