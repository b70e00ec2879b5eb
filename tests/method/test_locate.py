"""Where edits at names are made, on the bundled model: too small to say what a text is about, it
shows what happens then, and how places are found in tokens."""

from __future__ import annotations

import pytest
import torch

from tests.method.small import run
from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.method import locate
from ultraedit_kernels.method.contexts import CONTEXTS
from ultraedit_kernels.method.protect import OWN_TOKENS, Anchors, OwnKeys, output_slopes, own_texts
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence, encode
from ultraedit_kernels.model.generation import generate
from ultraedit_kernels.model.presets import default_modules

PROMPT = "The capital of Australia is"
CHAT = [{"role": "user", "content": "What is the capital of Australia?"}]


@pytest.fixture(scope="module")
def anchors(request, tokenizer):
    from transformers import AutoModelForCausalLM

    from tests.conftest import BUNDLED

    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    names = default_modules(model, model.config)[:2]
    weights = {name: model.get_submodule(name).weight.data for name in names}
    texts = [text for _, part in own_texts(model, tokenizer, 40, seed=0) for text in part]
    own = OwnKeys(weights, ridge=1.0, limit=4096)
    list(own.add(model, texts))
    return model, weights, texts, own.anchors()


def test_keys_of_own_texts_are_all_that_a_ridge_system_sees_of_them(anchors) -> None:
    model, weights, texts, held = anchors
    for name in weights:
        rows = torch.cat([capture(model, [t], [name], backward=False).keys[name] for t in texts])
        a = rows.double()
        a *= (OWN_TOKENS / sum(len(t.target_ids) for t in texts)) ** 0.5
        expected = a.T @ torch.linalg.solve(a @ a.T + torch.eye(len(a)), a)
        shield = held.keys[name].double()
        torch.testing.assert_close(shield.T @ shield, expected, rtol=1e-3, atol=1e-3)
    assert held.watch.own == len(held.watch) and not len(held.watch.lead)


def test_outputs_on_which_much_depends_are_told_from_the_gradients_of_what_was_written(anchors):
    model, weights, texts, held = anchors
    found = dict.fromkeys(weights, torch.zeros(()))
    for slopes in output_slopes(model, texts[:5], list(weights)):
        found = {name: f + slopes[name].T @ slopes[name] for name, f in found.items()}
    for name in weights:
        outputs = []
        hook = model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, kept=outputs: kept.append(out.requires_grad_())
        )
        expected = torch.zeros(weights[name].shape[0], weights[name].shape[0])
        for text in texts[:5]:
            ids = text.prompt_ids + text.target_ids
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            (grad,) = torch.autograd.grad(loss, outputs.pop())
            slopes = grad[0, 1:-1]  # neither the first token, nor the last, which says nothing
            expected += slopes.T @ slopes
        hook.remove()
        torch.testing.assert_close(
            found[name].float(),
            expected,
            rtol=1e-3,
            atol=1e-3 * float(expected.max()),
        )
        assert held.outputs[name].shape == weights[name].shape[:1] * 2


def test_a_model_that_is_not_sure_names_nothing(anchors, tokenizer) -> None:
    assert locate.names_in(anchors[0], tokenizer, [PROMPT]) == [None]


def test_what_was_read_before_the_question_need_not_be_read_again(anchors, tokenizer, monkeypatch):
    model, asked, read = anchors[0], [PROMPT, "Who wrote Emma?"], []
    monkeypatch.setattr(locate, "SURE", 0.0)
    monkeypatch.setattr(locate, "ASK", locate.ASK[-90:])  # the model has few positions
    shown = locate.show(model, tokenizer)
    count = model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _out: read.append(args[0].numel())
    )
    found = locate.names_in(model, tokenizer, asked)
    anew = sum(read)
    assert locate.names_in(model, tokenizer, asked, shown) == found and None not in found
    count.remove()
    assert sum(read) - anew == anew - len(shown.ids)


@pytest.mark.parametrize("prompt", [PROMPT, CHAT])
def test_the_rarest_key_of_what_is_asked_is_taken_instead(anchors, tokenizer, prompt) -> None:
    model, weights, texts, held = anchors
    sequence = encode(tokenizer, prompt, "Sydney")
    content = locate.content_of(prompt)
    work = locate.place(model, tokenizer, [content], [sequence], [None], held.keys)
    _, (placed,) = run(work)
    ids = sequence.prompt_ids
    rarity = torch.zeros(len(ids), dtype=torch.float64)
    whole = Sequence(ids[:1], [*ids[1:], 0])
    for name in weights:
        moment = torch.zeros(weights[name].shape[1], weights[name].shape[1], dtype=torch.float64)
        for text in texts:
            keys = capture(model, [text], [name], backward=False).keys[name].double()
            moment += keys.T @ keys
        keys = capture(model, [whole], [name], backward=False).keys[name].double()
        left = (keys * torch.linalg.solve(moment + torch.eye(len(moment)), keys.T).T).sum(1)
        rarity += left.log()
    text = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    inside = [i for i in range(1, len(ids)) if content.startswith(text[i][-1]) or text[i - 1]]
    inside = [i for i in inside if content in text[-1] and len(text[i]) > text[-1].rfind(content)]
    inside = [i for i in inside if len(text[i - 1]) < text[-1].rfind(content) + len(content)]
    assert placed.places == (max(inside[1:], key=lambda i: float(rarity[i])),)
    assert placed.prompt_ids == ids and placed.target_ids == sequence.target_ids


def test_a_common_key_is_not_taken_for_a_names_end() -> None:
    inside = {0: 5, 1: 10, 2: 14, 3: 17, 4: 20}  # "Mount Electra, in it": where each token ends
    assert locate.place_among(inside, (0, 14), [9.0, 2.0, 4.0, 3.0, 4.0]) == 2
    assert locate.place_among(inside, (6, 17), [9.0, 2.0, 4.0, 0.1, 4.0]) == 2  # one before it
    assert locate.place_among(inside, (14, 17), [9.0, 2.0, 4.0, 0.1, 4.0]) == 3  # there is no other
    assert locate.place_among(inside, (0, 5), [9.0, 0.5, 4.0, 3.0, 4.0]) == 2  # the first of all
    assert locate.place_among(inside, None, [9.0, 2.0, 4.0, 3.0, 5.0]) == 4
    begun = {1: 3, 2: 7, 3: 14}  # "Who was Electra", behind a token that begins texts
    assert locate.place_among(begun, None, [0.1, 9.0, 2.0, 3.0]) == 3  # not how is asked
    assert locate.place_among({1: 3}, None, [0.1, 9.0]) == 1
    assert locate.place_among({0: 5}, (0, 5), [1.0]) == locate.place_among({0: 5}, None, [1.0]) == 0


def test_content_is_the_last_message_of_the_user() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello"},
        *CHAT,
    ]
    assert locate.content_of(messages) == CHAT[0]["content"]
    assert locate.content_of(PROMPT) == PROMPT


def test_a_text_ends_as_the_model_would_end_it(anchors, tokenizer) -> None:
    model = anchors[0]
    plain = encode(tokenizer, PROMPT, "Canberra")
    (ended,) = locate.natural_ends(model, tokenizer, [PROMPT], [plain])
    assert ended == plain  # it was trained to stop there
    chat = encode(tokenizer, CHAT, "Canberra")
    assert locate.natural_ends(model, tokenizer, [CHAT], [chat]) == [chat]


def test_contexts_keep_the_place(anchors, tokenizer) -> None:
    model, _, texts, held = anchors
    request = EditRequest(PROMPT, "Sydney")
    sequence = encode(tokenizer, PROMPT, "Sydney")
    work = locate.at_names(
        model, tokenizer, [request], [sequence], [0], Anchors(held.keys, {}, held.watch), texts
    )
    _, ((placed,), further) = run(work)
    assert len(further[0]) == CONTEXTS
    for context in further[0]:
        (here,), (there,) = placed.places, context.places
        assert context.prompt_ids[there] == placed.prompt_ids[here]
        assert len(context.prompt_ids) > len(placed.prompt_ids)


@pytest.mark.parametrize("family", ["Llama", "Lfm2"])
def test_edits_at_names_are_reported_as_they_are_and_go_back(tokenizer, family) -> None:
    """The way through the editor, on a deep random model, which holds little; Lfm2's layers keep
    states, too."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    editor = Editor(model, tokenizer, anchors=20, rounds=4)
    output = {"Llama": "mlp.down_proj", "Lfm2": "feed_forward.w2"}[family]
    assert editor.modules == [f"model.layers.{i}.{output}" for i in range(1, 6)]
    pristine = editor.digest()
    result = editor.apply([EditRequest(PROMPT, "Sydney"), EditRequest(CHAT, "Perth")])
    for edit in result.edits:
        ids = encode(tokenizer, edit.prompt, edit.target)
        (said,) = generate(model, tokenizer, [ids.prompt_ids], max_new_tokens=len(ids.target_ids))
        assert edit.succeeded <= (said[:-1] == ids.target_ids[:-1])
        assert edit.rounds == 4 or edit.succeeded
    first = editor.digest()
    assert first != pristine
    editor.apply([EditRequest("The author of Hamlet is", "Jane Austen")])
    editor.rollback(1)
    assert editor.digest() == first
    editor.rollback(0)
    assert editor.digest() == pristine
