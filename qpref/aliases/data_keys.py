"""Aliases of data, chat templates, lengths, losses and the reference."""

from __future__ import annotations

from qpref.aliases.alias import Alias

DATA = (
    Alias(
        ours="data.train",
        why='a path, "hf:org/name/config@revision:split", or several [[data.train]] tables',
        trl="dataset_name datasets",
        axolotl="datasets",
        llamafactory="dataset",
        others="train_file data_path train_dataset data_files",
    ),
    Alias(
        ours="data.train",
        why='part of the name: "hf:org/name/config:split"',
        trl="dataset_config dataset_train_split",
        others="dataset_split train_split subset",
    ),
    Alias(
        ours="data.train",
        why="the file names behind the names in `dataset` are in dataset_info.json there",
        llamafactory="dataset_dir media_dir",
    ),
    Alias(
        ours="data.heldout",
        why="scored, never trained on",
        trl="dataset_test_split",
        axolotl="test_datasets",
        llamafactory="eval_dataset",
        others="val_dataset test_file eval_file validation_file",
    ),
    Alias(
        ours="data.heldout_share",
        why="a share of the prompts, at most 0.5, never a number of rows",
        trl="test_split_size",
        axolotl="val_set_size",
        llamafactory="val_size",
        others="split_dataset_ratio validation_split eval_split",
    ),
    Alias(
        ours="data.columns",
        why='qpref\'s name first: { prompt = "question" }',
        axolotl="field_messages field_chosen field_rejected message_property_mappings",
        others="column_mapping prompt_column chosen_column rejected_column",
    ),
    Alias(
        ours="data.max_length",
        why="tokens of prompt and response together; on_overflow says what happens to longer rows",
        trl="max_length",
        axolotl="sequence_len",
        llamafactory="cutoff_len",
        others="max_seq_length max_seq_len max_len model_max_length",
    ),
    Alias(
        ours="data.max_prompt_length",
        trl="max_prompt_length",
        axolotl="max_prompt_len",
        why="tokens of the prompt",
    ),
    Alias(
        ours=None,
        why="a response has what max_length leaves it after the prompt",
        trl="max_completion_length max_target_length",
    ),
    Alias(
        ours="data.on_overflow",
        why='"error", "drop" or "truncate"',
        trl="truncation_mode",
        axolotl="excess_length_strategy",
        others="truncation_strategy overflow",
    ),
    Alias(
        ours="data.template",
        why='"chat" renders with the tokenizer\'s own chat template, "none" concatenates; no template by name',
        axolotl="chat_template chat_template_jinja default_system_message",
        llamafactory="template",
        trl="chat_template chat_template_path",
        others="template_type",
    ),
    Alias(
        ours=None,
        why="all rows of a source are used; a source's weight below 1 samples them",
        llamafactory="max_samples",
        others="num_samples sample_count",
    ),
    Alias(
        ours="data.train",
        why="sources are concatenated; each one's weight says how often its rows are trained on",
        llamafactory="mix_strategy interleave_probs",
        others="dataset_mixer interleave_prob",
    ),
    Alias(
        ours=None,
        why="training order is shuffled by the seed in every epoch",
        trl="train_sampling_strategy",
        axolotl="shuffle_merged_datasets curriculum_sampling",
        llamafactory="disable_shuffling",
        is_lost=False,
    ),
    Alias(
        ours=None,
        why="data are read, tokenized and cached once, in one process",
        trl="dataset_num_proc dataset_streaming streaming remove_unused_columns dataloader_num_workers "
        "dataloader_pin_memory dataloader_drop_last dataloader_prefetch_factor dataloader_persistent_workers "
        "label_names ignore_bias_buffers",
        axolotl="dataset_prepared_path dataset_processes dataset_keep_in_memory remove_unused_columns "
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor skip_prepare_dataset",
        llamafactory="preprocessing_num_workers preprocessing_batch_size overwrite_cache dataloader_num_workers "
        "tokenized_path streaming buffer_size cache_dir remove_unused_columns",
        is_lost=False,
    ),
    Alias(
        ours="checks.duplicates",
        why="repeated rows are found and reported",
        axolotl="dataset_exact_deduplication",
    ),
    Alias(
        ours=None,
        why="only the response is scored, never the prompt",
        axolotl="train_on_inputs roles_to_train train_on_eos",
        llamafactory="train_on_prompt mask_history",
        is_lost=False,
    ),
    Alias(
        ours=None,
        why="tools are rendered by the tokenizer's chat template",
        llamafactory="tool_format",
        is_lost=False,
    ),
)

LOSS = (
    Alias(
        ours="loss.name",
        why="`qpref losses` lists the names; several [[loss]] tables with weights make a mixture",
        trl="loss_type",
        axolotl="rl dpo_loss_type",
        llamafactory="stage pref_loss",
        others="rlhf_type loss method",
    ),
    Alias(
        ours="loss.weight",
        why="in each of several [[loss]] tables",
        trl="loss_weights",
        axolotl="dpo_loss_weights",
    ),
    Alias(
        ours="loss.beta",
        trl="beta",
        axolotl="rl_beta dpo_beta trl.beta",
        llamafactory="pref_beta",
        others="kl_coef",
    ),
    Alias(ours="loss.beta", why="TRL calls ORPO's lambda beta, and so does qpref", axolotl="orpo_alpha"),
    Alias(
        ours="loss.label_smoothing",
        trl="label_smoothing",
        axolotl="dpo_label_smoothing",
        llamafactory="dpo_label_smoothing",
    ),
    Alias(
        ours="loss.weight",
        why="the NLL of the chosen response is a second [[loss]] of the mixture, the SFT loss, with this weight",
        trl="rpo_alpha",
        axolotl="rpo_alpha",
        llamafactory="pref_ftx",
        others="sft_weight nll_weight",
    ),
    Alias(
        ours="loss.weight",
        why="a second [[loss]] of the mixture, binary classifier optimization",
        llamafactory="pref_bco_weight",
    ),
    Alias(
        ours="loss.gamma",
        why="the target margin, in units of the reward",
        trl="simpo_gamma",
        axolotl="simpo_gamma",
        llamafactory="simpo_gamma",
    ),
    Alias(
        ours="loss.alpha", trl="cpo_alpha alpha", axolotl="cpo_alpha", why="weight of the NLL, or shape of the reward"
    ),
    Alias(
        ours="loss.desirable_weight",
        why="left out, classes are balanced by their counts",
        trl="desirable_weight",
        axolotl="kto_desirable_weight",
        llamafactory="kto_chosen_weight",
    ),
    Alias(
        ours="loss.undesirable_weight",
        why="left out, classes are balanced by their counts",
        trl="undesirable_weight",
        axolotl="kto_undesirable_weight",
        llamafactory="kto_rejected_weight",
    ),
    Alias(ours="loss.wpo", trl="use_weighting", axolotl="dpo_use_weighting"),
    Alias(ours="loss.ld_alpha", trl="ld_alpha", llamafactory="ld_alpha"),
    Alias(ours="loss.divergence", trl="f_divergence_type", why='"reverse_kl", "forward_kl", "js" or "alpha"'),
    Alias(ours="loss.alpha", trl="f_alpha_divergence_coef"),
    Alias(ours="loss.tau", trl="discopop_tau"),
    Alias(
        ours=None,
        why="lengths are handled by the loss: see ld_alpha, and the losses that average over tokens",
        axolotl="dpo_norm_loss",
    ),
    Alias(
        ours=None,
        why="losses that need no reference are losses of their own",
        trl="reference_free",
    ),
    Alias(
        ours="reference.fill",
        why='"before" computes the reference in one pass before training; either way it is computed once and cached',
        trl="precompute_ref_log_probs precompute_ref_batch_size",
        axolotl="precompute_ref_log_probs",
        others="precompute_ref",
    ),
    Alias(
        ours=None,
        why="the reference is the base with its adapters off, or the adapter named in [adapter] start",
        trl="ref_model ref_adapter_name model_adapter_name force_use_ref_model ref_model_name_or_path",
        llamafactory="ref_model ref_model_adapters ref_model_quantization_bit",
        others="model_ref",
    ),
    Alias(
        ours=None,
        why="a reference that moves with the policy can't be cached; train in rounds, each from [adapter] start",
        trl="sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    ),
)
