"""Oracle: the LM head applied to the captured states must give the model's own logits."""
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from relax.hidden import backbone, capture_hidden, hidden_states

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXTRA = {"qwen2": {}, "llama": {}, "qwen3": dict(head_dim=8), "gpt2": dict(n_embd=32, n_layer=2, n_head=4),
         "opt": dict(ffn_dim=48, word_embed_proj_dim=32)}


def tiny(kind="qwen2", **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | EXTRA[kind] | changes))).eval()


@pytest.fixture(params=EXTRA)
def model(request): return tiny(request.param)


@pytest.fixture
def ids(): return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def loss_gradients(model, ids):
    model.zero_grad()
    with capture_hidden(model) as tap:
        model(input_ids=ids)
        tap.states.tanh().pow(2).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_head_on_states_is_logits(model, ids):
    with capture_hidden(model) as tap:
        out = model(ids)
        assert tap.states.shape == (2, 7, 32) and tap.states.requires_grad
        torch.testing.assert_close(model.get_output_embeddings()(tap.states), out.logits)
    torch.testing.assert_close(hidden_states(model, ids), out_states := hidden_states(model, ids, torch.ones_like(ids)))
    torch.testing.assert_close(model.get_output_embeddings()(out_states), out.logits)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_gradient_reaches_all_but_the_head(kind, ids):
    model = tiny(kind)
    grads = loss_gradients(model, ids)
    assert set(dict(model.named_parameters())) - set(grads) == {"lm_head.weight"}
    assert all(g.abs().sum() > 0 for g in grads.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_gradient_checkpointing_changes_nothing(kind, reentrant, ids):
    model = tiny(kind).train()
    plain = loss_gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    checked = loss_gradients(model, ids)
    assert plain.keys() == checked.keys()
    for name in plain: torch.testing.assert_close(checked[name], plain[name])


def test_lora_states_are_the_adapted_ones(ids):
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    with capture_hidden(lora) as tap:
        out = lora(input_ids=ids)
        torch.testing.assert_close(lora.get_base_model().lm_head(tap.states), out.logits)
        with lora.disable_adapter(): lora(input_ids=ids)
        assert not torch.allclose(tap.states, hidden_states(lora, ids), atol=1e-3)
    grads = loss_gradients(lora, ids)
    assert grads and all("lora_" in n and g.abs().sum() > 0 for n, g in grads.items())
    assert len(grads) == 2 * 2 * 2


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="model: .*prompt-learning.*accepted"): backbone(tuned)


def test_fused_head_of_trl(ids):
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"): pytest.skip("this trl has no fused head")
    model = tiny()
    plain = hidden_states(model, ids)
    utils.add_fused_lm_head(model)
    with capture_hidden(model) as tap:
        model(input_ids=ids, labels=ids, fused_lm_head=True)
        torch.testing.assert_close(tap.states, plain)


def test_wrappers_come_off(ids):
    model = tiny()
    wrapped = nn.DataParallel(nn.DataParallel(model))
    with capture_hidden(wrapped) as tap:
        logits = wrapped(ids).logits
        torch.testing.assert_close(model.lm_head(tap.states), logits)
    assert backbone(wrapped) is backbone(model) is model.model


def test_vision_language_model():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    text = {k: SHAPE[k] for k in list(SHAPE)[:6]} | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=2, spatial_merge_size=1,
                  fullatt_block_indexes=[0], window_size=8)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61,
                                                                vision_start_token_id=62, vision_end_token_id=63)).eval()
    ids = torch.tensor([[5, 62, 60, 60, 60, 60, 63, 7]])
    with capture_hidden(model) as tap:
        out = model(ids, pixel_values=torch.randn(4, 24), image_grid_thw=torch.tensor([[1, 2, 2]]), mm_token_type_ids=(ids == 60).int())
        torch.testing.assert_close(model.lm_head(tap.states), out.logits)
        tap.states.sum().backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("left, right", [(3, 0), (0, 3), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float])
def test_padding_side_and_content_do_not_matter(model, ids, left, right, dtype):
    truth, mask = hidden_states(model, ids), torch.zeros(2, left + 7 + right).to(dtype)
    mask[:, left:left + 7] = 1
    for junk in (0, 9):
        longer = torch.full(mask.shape, junk)
        longer[:, left:left + 7] = ids
        torch.testing.assert_close(hidden_states(model, longer, mask)[:, left:left + 7], truth, atol=1e-5, rtol=1e-4)


def test_rows_of_different_length(ids):
    model = tiny("gpt2")
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4]).bool()
    torch.testing.assert_close(hidden_states(model, ids, mask)[1:, 3:], hidden_states(model, ids[1:, 3:]), atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x))])
        return out


def test_hidden_states_makes_no_logits(ids):
    model, ids = tiny(vocab_size=4096), ids.repeat(4, 1)
    with Largest() as plain: model(ids)
    with Largest() as direct: hidden_states(model, ids)
    assert plain.elements == ids.numel() * 4096 and direct.elements < ids.numel() * 100


def test_grad_mode_is_the_callers(ids):
    model = tiny()
    with torch.no_grad(), capture_hidden(model) as tap:
        model(ids)
        assert not tap.states.requires_grad and not hidden_states(model, ids).requires_grad
    assert hidden_states(model, ids).requires_grad


def test_nothing_is_kept_alive(ids):
    model = tiny()
    with capture_hidden(model) as tap:
        model(ids)
        watched = weakref.ref(tap.states)
        assert watched() is not None
    gc.collect()
    assert watched() is None and not backbone(model)._forward_hooks
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None and tap is not None


def test_hook_goes_on_exceptions(ids):
    model = tiny()
    with pytest.raises(KeyboardInterrupt):
        with capture_hidden(model) as tap:
            model(ids)
            raise KeyboardInterrupt
    assert not backbone(model)._forward_hooks
    with pytest.raises(RuntimeError, match="inside the block"): tap.states


def test_reading_too_early_or_too_late_says_what_to_do(ids):
    model = tiny()
    with capture_hidden(model) as tap:
        with pytest.raises(RuntimeError, match="call the model inside"): tap.states
        model(ids)
        kept = tap.states
    with pytest.raises(RuntimeError, match="read them inside the block"): tap.states
    kept.sum().backward()  # what the caller took stays usable


def test_last_forward_wins_and_blocks_nest(ids):
    model = tiny()
    with torch.no_grad(), capture_hidden(model) as outer:
        model(ids)
        with capture_hidden(model) as inner:
            model(ids[:1])
            assert torch.equal(inner.states, outer.states)
        model(ids[:, :3])
        assert outer.states.shape == (2, 3, 32)
    for _ in range(3):
        with capture_hidden(model) as tap:
            with pytest.raises(RuntimeError): tap.states
            model(ids)
    assert not backbone(model)._forward_hooks


def test_generate_and_tuple_output(ids):
    model = tiny()
    with torch.no_grad(), capture_hidden(model) as tap:
        model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids))
        assert tap.states.shape == (2, 1, 32)
        logits = model(ids, return_dict=False)[0]
        torch.testing.assert_close(model.lm_head(tap.states), logits)


class NoStates(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_model = nn.Linear(3, 3)

    def forward(self, x): return self.base_model(x)


@pytest.mark.parametrize("bad", [nn.Linear(2, 2), None, "Qwen/Qwen2.5-0.5B"])
def test_no_backbone(bad, ids):
    with pytest.raises(ValueError, match="model: got .*accepted: a transformers causal"): capture_hidden(bad).__enter__()
    with pytest.raises(ValueError, match="model: got .*accepted"): hidden_states(bad, ids)


def test_backbone_without_states():
    model = NoStates()
    with pytest.raises(ValueError, match="model: its backbone Linear returned Tensor"):
        with capture_hidden(model): model(torch.ones(1, 3))
    assert not model.base_model._forward_hooks


@pytest.mark.parametrize("bad", [torch.ones(7, dtype=torch.long), torch.ones(2, 7), [[1, 2]]])
def test_bad_ids(bad):
    with pytest.raises(ValueError, match=r"input_ids: got .*accepted: a \(B, T\)"): hidden_states(tiny(), bad)


def test_bad_mask(ids):
    with pytest.raises(ValueError, match=r"attention_mask: got .*accepted: the shape of input_ids, \(2, 7\)"): hidden_states(tiny(), ids, torch.ones(2, 6))
