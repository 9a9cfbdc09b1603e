"""The text protocol: prompts from messages, typed events from the model's text, tokens from text and back.

Knows text, tags, templates and tokenizers. Knows no tensors, no HTTP and no engine.
"""

from __future__ import annotations

from tern.chat.detokenizer import Detokenizer
from tern.chat.events import (
    ContentDelta,
    ParsedMessage,
    ParsedToolCall,
    ReasoningDelta,
    ResponseEvent,
    ToolCallDelta,
    collect_message,
)
from tern.chat.grammar import CompiledGrammar, GrammarCompiler
from tern.chat.grammar_rules import AnswerForm, AnswerRules
from tern.chat.held_response import HeldResponseParser, parse_held_response
from tern.chat.messages import validate_messages
from tern.chat.parser import ParserState, ResponseParser, parse_response, state_after_prompt
from tern.chat.protocol import ChatProtocol, RenderedPrompt
from tern.chat.template import ChatTemplate
from tern.chat.text_stream import TextStep, TextStream, ThinkingControl
from tern.chat.tokenizer import Tokenizer, bad_word_sequences
from tern.chat.tools import validate_tools

__all__ = [
    "AnswerForm",
    "AnswerRules",
    "ChatProtocol",
    "ChatTemplate",
    "CompiledGrammar",
    "ContentDelta",
    "Detokenizer",
    "GrammarCompiler",
    "HeldResponseParser",
    "ParsedMessage",
    "ParsedToolCall",
    "ParserState",
    "ReasoningDelta",
    "RenderedPrompt",
    "ResponseEvent",
    "ResponseParser",
    "TextStep",
    "TextStream",
    "ThinkingControl",
    "Tokenizer",
    "ToolCallDelta",
    "bad_word_sequences",
    "collect_message",
    "parse_held_response",
    "parse_response",
    "state_after_prompt",
    "validate_messages",
    "validate_tools",
]
