"""Tell an environment that answers as chat role user from a person who does.

Many harnesses without tool calls put what the world said into user messages. After the agent's first action a user
message is the environment's if what it answers is always an action, or if it mostly reads like an output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from backtalk.exchange.read.spellings import ChatMessage

# How harnesses begin, and a shell ends, what they hand on.
_OUTPUT = re.compile(
    r"\s*(?:<(?:returncode|exception|output|observation|tool_response|function_results?|execution_results?|stdout|"
    r"results?|terminal|environment)\b|(?:OBSERVATION|Observation|EXECUTION RESULT|Execution (?:result|output)|"
    r"(?:Command |Tool )?(?:Output|output|result|Result)|stdout|STDOUT)\b[^\n]{0,40}:|"
    r"(?:New Terminal Output|Current Terminal Screen|Current terminal state|Previous response had)\b|"
    r"Traceback \(most recent call last\)|\[?(?:exit|return) ?code\b|"
    r"\{\s*\"(?:returncode|exit_code|output|stdout|observation|result)\")"
    r"|[\s\S]*(?:bash|sh)-[\d.]*\$\s*\Z"
)
# A call in tags, ReAct's line, a command in JSON, or a message that ends in a fenced block.
_ACTION = re.compile(
    r"<(?:tool_call|function|execute|action|bash|invoke|tool_use|command)\b|<function=|^\s*(?:Action|ACTION)\b[^\n]*:|"
    r"\"(?:commands|keystrokes|command|cmd|tool|tool_name|action|function)\"\s*:|```\s*\Z",
    re.MULTILINE,
)


def looks_observed(text: str) -> bool:
    """Return whether a text begins as harnesses begin an output."""
    return _OUTPUT.match(text) is not None


def observed_users(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages with ``observed`` set on those that an environment said as chat role user.

    A record that has messages of tools says by them who speaks, so its users stay users.
    """
    first = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
    after = messages[first:]
    users = [message for message in after if message.role == "user" and not message.given]
    if not users or any(message.role == "tool" for message in after):
        return list(messages)
    answered = [said for said, answer in pairwise(after) if said.role == "assistant" and answer.role == "user"]
    always_acts = all(message.calls or _ACTION.search(message.text) for message in answered)
    outputs = sum(looks_observed(message.text) for message in users)
    if not always_acts and 2 * outputs < len(users):
        return list(messages)
    return [*messages[:first], *(replace(m, observed=True) if m.role == "user" else m for m in after)]
