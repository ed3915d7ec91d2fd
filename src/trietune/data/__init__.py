"""A source becomes token sequences with labels; owns the tokenizer, and knows nothing of models."""

from trietune.data.counts import Count, DataCounts, SplitCounts
from trietune.data.encoder import Encoder, load_tokenizer, make_encoder
from trietune.data.examples import IGNORED_LABEL, Example, ExampleSource, Message, Task, TokenSequences
from trietune.data.load import load_data, load_split
from trietune.data.loaded_data import Data
from trietune.data.preview import ExamplePreview, TokenText, preview_examples
from trietune.data.prompt_formats import make_plain_format, make_prompt_format
from trietune.data.templates import PromptFormat

__all__ = [
    "IGNORED_LABEL",
    "Count",
    "Data",
    "DataCounts",
    "Encoder",
    "Example",
    "ExamplePreview",
    "ExampleSource",
    "Message",
    "PromptFormat",
    "SplitCounts",
    "Task",
    "TokenSequences",
    "TokenText",
    "load_data",
    "load_split",
    "load_tokenizer",
    "make_encoder",
    "make_plain_format",
    "make_prompt_format",
    "preview_examples",
]
