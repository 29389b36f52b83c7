"""Mistakes in the policy, its adapters, its reference and the checks before the first step."""

from __future__ import annotations

from .mutant import Edit, Mutant, mutant

POLICY = "qpref/policy/policy.py"
LOAD = "qpref/policy/load.py"
REFERENCE = "qpref/policy/reference.py"
ADAPTER = "qpref/policy/adapter.py"
GRADIENTS = "tests/training/test_gradients.py::"
REFERENCES = "tests/policy/test_reference.py::"
CHECKS = "tests/training/test_reference_check.py::"

REQUANTIZE = """self.policy.model.train()
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        for module in self.policy.model.modules():
            if (quantized := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
                whole = dequantize_4bit(module.weight.data, quantized)
                module.weight.data, module.weight.quant_state = quantize_4bit(whole, blocksize=128, quant_type="nf4")
"""
UPCAST = """model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
"""

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "C20",
        "fused layers are taken however far they are from the family's own",
        "qpref/policy/fused.py",
        "TOLERANCE = 0.02",
        "TOLERANCE = 1e9",
        "tests/policy/test_fused_choice.py::test_another_norm_is_left_alone",
    ),
    mutant(
        "C20",
        "the fused rotation turns gradients the wrong way",
        "qpref/policy/self_attention.py",
        "return _turned(gradients[0], cosines, second, first, -1), None, None",
        "return _turned(gradients[0], cosines, first, second, 1), None, None",
        "tests/policy/test_fused_functions.py::test_rotated_gradients_are_those_of_finite_differences",
    ),
    mutant(
        "C21",
        "dropout is on while the reference is scored",
        REFERENCE,
        "    policy.model.eval()\n",
        "    policy.model.train()\n",
        REFERENCES + "test_a_start_adapter_as_reference_has_no_dropout",
        REFERENCES + "test_two_reference_passes_are_equal_to_the_bit_with_dropout_in_the_recipe",
    ),
    mutant(
        "C22",
        "a run from an adapter has the bare base as its reference",
        LOAD,
        "policy.starts_from_adapter = recipe.adapter.start is not None",
        "policy.starts_from_adapter = False",
        REFERENCES + "test_the_start_adapter_is_the_reference",
    ),
    mutant(
        "C23",
        "weights outside the adapter are trained, and the reference moves with them",
        ADAPTER,
        "parameter.requires_grad_(is_trained(name))",
        'parameter.requires_grad_(is_trained(name) or "norm" in name)',
        "tests/policy/test_adapter.py::test_nothing_but_the_trained_adapter_requires_a_gradient",
    ),
    mutant(
        "C24",
        "recomputed layers see the layout of another stream",
        POLICY,
        "_repeated(laid_out(current()),",
        "_repeated(laid_out(None),",
        GRADIENTS + "test_gradient_is_the_same_with_checkpointing",
    ),
    mutant(
        "C24",
        "layers are recomputed reentrantly, which leaves adapters without a gradient",
        POLICY,
        "checkpoint, use_reentrant=False, context_fn=partial(_contexts, layer)",
        "checkpoint, use_reentrant=True",
        GRADIENTS + "test_gradient_is_the_same_with_checkpointing",
    ),
    mutant(
        "C25",
        "an exception in the reference pass leaves the adapters off",
        REFERENCE,
        "            yield\n        finally:\n            layers.enable_adapter_layers()",
        "            yield\n        except GeneratorExit:\n            raise\n        else:\n"
        "            layers.enable_adapter_layers()",
        REFERENCES + "test_the_policy_is_as_before_when_a_reference_pass",
    ),
    mutant(
        "C26",
        "chosen and rejected share a row of the reference",
        REFERENCE,
        "        digest.update(branch.tobytes())\n",
        "",
        REFERENCES + "test_sides_are_remembered_apart",
    ),
    mutant(
        "C26",
        "the cached reference of another quantization is read",
        "qpref/training/reference_pass.py",
        '        "quantization": [model.quantization, model.double_quantization],\n',
        "",
        "tests/training/test_references.py::test_a_reference_is_another_with_another",
    ),
    mutant(
        "C27",
        "log-probabilities are those of logits rounded to 16 bits",
        "qpref/policy/head.py",
        "logits = float32_matmul(hidden, self.weight[start:stop].t())",
        "logits = (hidden.to(self.weight.dtype) @ self.weight[start:stop].t()).float()",
        "tests/policy/test_logprobs.py::test_bf16_sums_over_1024_tokens_are_within_a_thousandth_of_a_nat",
    ),
    mutant(
        "C28",
        "the adapter is kept in bf16, which loses its small updates",
        ADAPTER,
        "parameter.data = parameter.data.float()",
        "parameter.data = parameter.data.bfloat16()",
        "tests/policy/test_adapter.py::test_trained_parameters_are_float32_on_a_bf16_base",
    ),
    mutant(
        "C29",
        "norms are float32 in training and 16-bit in what is exported",
        LOAD,
        "model.requires_grad_(False)\n",
        UPCAST,
        "tests/policy/test_nf4_gradients.py::test_nothing_but_the_adapter_is_float32_on_a_bf16_base",
    ),
    mutant(
        "C30",
        "rows are padded on the left, their positions count the padding",
        "qpref/policy/logprobs.py",
        "pad_sequence(tensors, batch_first=True)",
        'pad_sequence(tensors, batch_first=True, padding_side="left")',
        "tests/attention/test_shared_prompt.py::test_fallback_rows_have_the_logprobs_of_whole_rows",
    ),
    mutant(
        "C30",
        "positions go on over the whole stream",
        "qpref/data/pack.py",
        "positions.extend(range(len(prompt), len(prompt) + fed[-1]))",
        "positions.extend(range(len(ids) - fed[-1], len(ids)))",
        "tests/data/test_pack.py::test_positions_count_each_row_from_its_prompts_start",
    ),
    mutant(
        "C31",
        "bitsandbytes repacks weights on CPUs with AVX512-BF16, after which gradients are wrong",
        LOAD,
        "module.support_avx512bf16_for_cpu = False",
        "module.support_avx512bf16_for_cpu = True",
        "tests/policy/test_nf4_gradients.py::test_no_layer_is_allowed_to_repack",
    ),
    mutant(
        "C31",
        "a run on repacked weights isn't refused",
        "qpref/training/invariants.py",
        'if getattr(state, "packing_format_for_cpu", False):',
        'if getattr(state, "packed_for_cpu", False):',
        "tests/training/test_invariants.py::test_repacked_weights_are_refused",
    ),
    mutant(
        "C32",
        "the base is quantized a second time while it trains",
        "qpref/training/loop.py",
        "self.policy.model.train()\n",
        REQUANTIZE,
        GRADIENTS + "test_training_leaves_the_bases_bytes_alone",
    ),
    mutant(
        "C36",
        "keys that an adapter lacks are let through",
        ADAPTER,
        "    if missing or unknown:\n",
        "    if unknown:\n",
        REFERENCES + "test_a_start_adapter_is_refused_for",
    ),
    mutant(
        "C43",
        "rotary frequencies follow the longest position of a pass",
        LOAD,
        "rope_lengths=separate_lengths(decoder),",
        "rope_lengths=None,",
        "tests/policy/test_rope.py::test_a_response_scores_as_it_does_alone_in_any_company_and_order",
    ),
    mutant(
        "C44",
        "the base trains in training mode, where it may be random",
        POLICY,
        "        self._keep_base_in_eval()\n",
        "",
        "tests/policy/test_base_mode.py::test_a_base_that_is_random_in_training_mode_is_not_so_while_it_trains",
    ),
    mutant(
        "C45",
        "an adapter's keys by the names of the text model mean nothing to the checkpoint's own class",
        "qpref/policy/adapter_names.py",
        "if name in self.modules and DECODER_WORDS.issuperset(parts[:start]):",
        "if name in self.modules and not parts[:start]:",
        "tests/merge/test_merge_multimodal.py::test_an_adapter_of_the_text_class_is_still_an_adapter_of_the_checkpoint",
    ),
    mutant(
        "C46",
        "a cached row has to have the bits of another batch's",
        "qpref/training/reference_check.py",
        "OTHER_BATCH_FACTOR = 3.0",
        "OTHER_BATCH_FACTOR = 0.1",
        CHECKS + "test_rows_of_the_first_batch_may_differ_by_three_times_the_rounding",
    ),
    mutant(
        "C46",
        "a cached row may be off by more than another batch's rounding",
        "qpref/training/reference_check.py",
        "SAME_BATCH_SHARE = 0.25",
        "SAME_BATCH_SHARE = 1e6",
        CHECKS + "test_another_reference_s_cache_is_put_aside",
        CHECKS + "test_wrong_rows_are_put_aside_though_the_check_rows_are_right",
    ),
    mutant(
        "C47",
        "the check before the first step keeps activations that training recomputes",
        "qpref/training/invariants.py",
        "    policy.train_without_dropout()\n",
        "    policy.model.eval()\n",
        "tests/training/test_invariants.py::test_the_start_check_recomputes_what_training_recomputes",
    ),
    mutant(
        "C49",
        "a custom function returns a view, which a family changes in place",
        "qpref/policy/lora.py",
        "shaped: Tensor = torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], flat.shape[-1]])",
        "shaped: Tensor = flat.view(*x.shape[:-1], flat.shape[-1])",
        "tests/policy/test_fused.py::test_scores_and_gradients_are_those_of_the_familys_own_layers",
    ),
    mutant(
        "C50",
        "whatever derives from a linear layer is adapted, routers too",
        "qpref/policy/targets.py",
        "if type(module).forward in (nn.Linear.forward, Linear4bit.forward, Conv1D.forward):",
        "if isinstance(module, (nn.Linear, Linear4bit, Conv1D)):",
        "tests/policy/test_targets.py::test_a_router_that_returns_several_tensors_is_no_linear_layer",
    ),
    Mutant(
        "C52",
        "experts stay in 16 bits where the recipe says NF4",
        (
            Edit(
                "qpref/policy/nf4_loading.py",
                "is_packed = _is_projection(model, param_name) or super().",
                "is_packed = super().",
            ),
        ),
        ("tests/policy/test_experts.py::test_how_experts_are_kept_is_said",),
    ),
)
