"""Where an action ends after its calls: token by token as it is sampled, and afterwards on the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backtalk.envs.terminal import BASH, SUBMIT
from backtalk.errors import RenderError
from backtalk.language.action_end import ActionEnd, CallsEnd
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat
from backtalk.messages import ToolCall
from tiny import CHAT_TEMPLATE, tiny_tokenizer

TAGS, HERMES, QWEN3_CODER, LLAMA3_JSON, BASH_BLOCK, PLAIN = ToolFormat
CLOSING = (TAGS, HERMES, QWEN3_CODER, BASH_BLOCK)
TOOLS = (BASH, SUBMIT)
HERMES_CALL = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
CODER_CALL = "<tool_call>\n<function=bash>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>"
CALLS = {TAGS: "<bash>ls</bash>", HERMES: HERMES_CALL, QWEN3_CODER: CODER_CALL, BASH_BLOCK: "```bash\nls\n```"}


@cache
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, but for ``>[`` and ``>x``, which hold the end of a mark and more; tags are plain text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, ">[", ">x"])}
    backend = Tokenizer(models.BPE(vocabulary, [(">", "["), (">", "x")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@cache
def renderer(tool_format: ToolFormat, *, tokens: bool = False, **config: Any) -> Renderer:
    tokenizer = tiny_tokenizer() if tokens else bytes_tokenizer()
    return Renderer(tokenizer, TOOLS, RendererConfig(tool_format=tool_format, **config))


def end_of(found: Renderer) -> ActionEnd:
    assert found.action_end is not None
    return found.action_end


def kept(found: Renderer, text: str) -> str:
    """Return what is kept of an action with this text and a stop token after it."""
    ids = found.encode_text(text)
    return found.encoder.decode(ids[: end_of(found).count_kept(ids)])


def first_over(found: Renderer, ids: Sequence[int]) -> int | None:
    """Return the number of tokens that were sampled when the watch said that the action is over."""
    is_over = end_of(found).watch()
    return next((number for number, token in enumerate(ids, 1) if is_over(token)), None)


STOP = "<|im_end|>"


def test_tokens_of_tags_by_hand() -> None:
    found = renderer(TAGS, tokens=True)
    ids = {text: found.encoder.control_ids[text] for text in ("<bash>", "</bash>", "<submit>", STOP, "<|im_start|>")}
    (a,), (line,), (b,) = (found.encode_text(text)[:-1] for text in ("a", "\n", "b"))
    call = [ids["<bash>"], a, ids["</bash>"]]
    end = end_of(found)
    assert end.find([ids["<bash>"], a]) is None
    assert end.find(call) == CallsEnd(3, is_over=False)
    for whole in ([*call, ids[STOP]], [*call, line, line, ids[STOP]]):  # the policy ends its turn itself
        assert (end.count_kept(whole), first_over(found, whole)) == (len(whole), None)
    for rest in ([ids["<|im_start|>"], b], [b, b, b, ids[STOP]], [ids["<submit>"], a]):
        assert (end.count_kept([*call, *rest]), first_over(found, [*call, *rest])) == (3, 4)
    # White space after the call is in no history either, if something else follows it.
    assert (end.count_kept([*call, line, line, b]), first_over(found, [*call, line, line, b])) == (3, 6)
    # The same characters in other tokens are text where tags are tokens.
    spelled = found.encode_text("<bash>ls")[:-1] + tuple(bytes_of(found, "</bash> and more"))
    assert end.find(spelled) is None


def bytes_of(found: Renderer, text: str) -> list[int]:
    return [found.encoder.backend.token_to_id(letter) for letter in text.replace(" ", "\u0120")]


def test_a_token_that_holds_the_end_of_the_mark_and_more_is_kept_whole() -> None:
    found = renderer(HERMES)
    ids = found.encode_text(f"{HERMES_CALL}[it goes on")
    assert ids[len(HERMES_CALL) - 1] == 256  # ">[", so there are as many tokens as characters up to it
    assert end_of(found).count_kept(ids) == len(HERMES_CALL)
    assert first_over(found, ids) == len(HERMES_CALL)
    assert kept(found, f"{HERMES_CALL}[it goes on") == f"{HERMES_CALL}["


@pytest.mark.parametrize("tool_format", CLOSING)
def test_what_follows_a_call_is_dropped(tool_format: ToolFormat) -> None:
    found, call = renderer(tool_format), CALLS[tool_format]
    for rest in ("", "\n", " \n\n"):
        assert kept(found, call + rest) == call + rest + STOP
    invented = "\n<tool_response>\na.txt\n</tool_response>\nThen I see a.txt"
    assert kept(found, call + invented) == call
    assert kept(found, f"{call}\n{call}") == call  # one call is run, so a second one counts as something else
    assert kept(found, f"é🙂\n{call}\n🙂") == f"é🙂\n{call}"
    assert kept(found, f"<think>\n{call}\nbut\n</think>\n{call}\nhm") == f"<think>\n{call}\nbut\n</think>\n{call}"
    assert kept(found, "no call, and it goes on") == f"no call, and it goes on{STOP}"


def test_a_closing_mark_that_is_text_ends_nothing() -> None:
    inside = '<tool_call>{"name": "bash", "arguments": {"command": "echo \'</tool_call>\' done"}}</tool_call>'
    assert kept(renderer(HERMES), f"{inside} more") == inside
    assert first_over(renderer(HERMES), renderer(HERMES).encode_text(inside)) is None
    value = CODER_CALL.replace("ls", "echo </function></tool_call> done")
    assert kept(renderer(QWEN3_CODER), f"{value}\nmore") == value
    fenced = "````bash\ncat <<x\n```\nx\n````"
    assert kept(renderer(BASH_BLOCK), f"Now:\n{fenced}\nIt says") == f"Now:\n{fenced}"
    assert kept(renderer(BASH_BLOCK), "```bash\nls\n```more\n```\nrest") == "```bash\nls\n```more\n```"


@pytest.mark.parametrize(
    ("tool_format", "call"),
    [
        (HERMES, '<tool_call>\n{"name": "bash", arguments: {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"arguments": {"command": "echo </tool_call>"}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}}\n</tool_call>'),
        (HERMES, "<tool_call>\nls\n</tool_call>"),
        (QWEN3_CODER, "<tool_call>\nls\n</tool_call>"),
        (QWEN3_CODER, CODER_CALL.replace("</parameter>\n", "</parameter>\n<parameter=command>\nls\n</parameter>\n")),
        (TAGS, "<bash>ls</submit>"),
    ],
)
def test_a_call_that_cannot_be_read_ends_the_action_too(tool_format: ToolFormat, call: str) -> None:
    for config in ({}, {"max_calls_per_turn": 3}, {"which_calls": "last"}):
        assert kept(renderer(tool_format, **config), f"{call}\nResult: 4") == call
        assert kept(renderer(tool_format, **config), call) == call + STOP


def test_an_unfinished_call_is_left_alone() -> None:
    for text in (
        '<tool_call>{"name": "bash", "arguments": {"command": "x</tool_call> and on',
        "<tool_call>\n{",
        "<tool",
    ):
        assert kept(renderer(HERMES), text) == text + STOP
    assert kept(renderer(QWEN3_CODER), CODER_CALL[:60] + "</tool_call> x") == CODER_CALL[:60] + "</tool_call> x" + STOP


@pytest.mark.parametrize("config", [{"max_calls_per_turn": 3}, {"which_calls": "last"}])
def test_of_several_calls_the_block_is_kept(config: dict[str, Any]) -> None:
    for tool_format in (TAGS, HERMES, QWEN3_CODER):
        found, call = renderer(tool_format, **config), CALLS[tool_format]
        assert kept(found, f"{call}\n{call}\n") == f"{call}\n{call}\n{STOP}"
        assert kept(found, f"{call}\n{call}\nIt says") == f"{call}\n{call}"
        assert kept(found, f"{call} then {call}") == call
        assert kept(found, f"{call}\n{call[:9]}") == f"{call}\n{call[:9]}{STOP}"  # cut within the second
        four = "\n".join([call] * 4)
        assert kept(found, four) == (four + STOP if "which_calls" in config else "\n".join([call] * 3))
    block, found = CALLS[BASH_BLOCK], renderer(BASH_BLOCK, **config)
    assert kept(found, f"{block}\nand\n{block}\n") == f"{block}\nand\n{block}\n{STOP}"  # prose is part of that format


def test_there_is_no_end_where_it_is_off_or_nothing_can_be_closed() -> None:
    assert renderer(LLAMA3_JSON).action_end is renderer(PLAIN).action_end is None
    assert renderer(HERMES, stop_after_call=False).action_end is None
    assert renderer(HERMES).for_tools(()).action_end is None


MARKS = (
    "<tool_call>", "</tool_call>", "<function=bash>", "</function>", "<parameter=command>", "</parameter>", "</",
    '{"name": "bash", "arguments": {"command": "ls"}}', '{"name": ', "}", '"', "\\", "```", "```bash\n", "\n```",
    "````", "<bash>", "</bash>", "<submit>", "</submit>", "<think>", "</think>", "\n", " ", ">[", "é", "🙂",
    *CALLS.values(),
)  # fmt: skip
HOSTILE_TEXT = st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=8).map("".join)
SETTINGS = st.sampled_from([{}, {"max_calls_per_turn": 2}, {"which_calls": "last"}, {"thinking": "keep"}])


@settings(max_examples=80, deadline=None)
@given(tool_format=st.sampled_from(CLOSING), text=HOSTILE_TEXT, config=SETTINGS)
@example(tool_format=QWEN3_CODER, text=f"{CODER_CALL.removesuffix('</tool_call>')}</tool<tool_call>", config={})
def test_a_sampler_that_stops_early_and_one_that_does_not_keep_the_same(
    tool_format: ToolFormat, text: str, config: dict[str, Any]
) -> None:
    found = renderer(tool_format, **config)
    ids = found.encode_text(text)
    count, seen = end_of(found).count_kept(ids), first_over(found, ids)
    assert (seen is None) == (count == len(ids))
    if seen is not None:
        assert end_of(found).count_kept(ids[:seen]) == count < seen
        assert end_of(found).count_kept(ids[:count]) == count


@settings(max_examples=50, deadline=None)
@given(tool_format=st.sampled_from(CLOSING), command=HOSTILE_TEXT)
def test_a_call_that_the_format_can_hold_is_never_cut(tool_format: ToolFormat, command: str) -> None:
    found = renderer(tool_format)
    try:
        ids = found.encode_action(ToolCall("bash", {"command": command}))
    except RenderError:
        return
    assert end_of(found).count_kept(ids) == len(ids)
    assert first_over(found, ids) is None
    assert end_of(found).count_kept((*ids[:-1], *found.encode_text("\nand on"))) == len(ids) - 1
