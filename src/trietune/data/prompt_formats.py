"""Make prompt formats: of data that is trained on, and of a base model that is only asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trietune.config.settings import Settings
from trietune.data.chat import rewrites_turns
from trietune.data.columns import RowFormat
from trietune.data.encoder import check_tokenizer, find_bos_id, find_stop_ids, hash_tokenizer
from trietune.data.examples import Example, Task
from trietune.data.templates import PromptFormat, literal_text
from trietune.errors import UserError
from trietune.io.places import expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def make_prompt_format(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    row_format: RowFormat,
    conversations: Sequence[Example] = (),
    check_stop: Callable[[], None] = lambda: None,
) -> PromptFormat:
    """The prompt format of a row format; the task of custom data is told by the data later.

    Args:
        conversations: the first ones of the data, see `find_stop_ids` and `rewrites_turns`.

    Raises:
        UserError: the tokenizer cannot be used, or conversations have no chat template.
    """
    check_tokenizer(tokenizer, name=_name(tokenizer))
    templates = (row_format.prompt_template, row_format.completion_template)
    template_text = "".join(literal_text(template, row_format.template_columns) for template in templates)
    # Whole prompts that were made elsewhere, and templates that spell special tokens, mean those tokens.
    is_chat = row_format.kind in ("messages", "answer_messages")
    may_mean_them = is_chat or row_format.kind in ("columns", "text", "tokens") or _is_bare(row_format)
    spells_them = any(token in template_text for token in tokenizer.all_special_tokens)
    chat_template = _find_chat_template(settings, tokenizer, row_format)
    prompt_format = PromptFormat(
        kind="chat" if is_chat else "tokens" if row_format.kind == "tokens" else "template",
        prompt_template=row_format.prompt_template,
        completion_template=row_format.completion_template,
        chat_template=chat_template,
        # Of answers that are compared, only the last one is learned.
        is_turn_by_turn=row_format.kind == "answer_messages"
        or (row_format.kind == "messages" and rewrites_turns(tokenizer, chat_template, conversations, check_stop)),
        parses_special_tokens=may_mean_them or spells_them,
        bos_id=find_bos_id(tokenizer, settings.add_bos),
        eos_id=int(tokenizer.eos_token_id),
        stop_ids=(int(tokenizer.eos_token_id),),
        task=row_format.task,
        tokenizer_hash=hash_tokenizer(tokenizer),
        template_columns=row_format.template_columns,
        system_prompt=_find_system_prompt(settings, is_chat=is_chat),
    )
    return replace(prompt_format, stop_ids=find_stop_ids(tokenizer, prompt_format, conversations, check_stop))


def make_plain_format(tokenizer: PreTrainedTokenizerFast) -> PromptFormat:
    """How a base model is asked: as a conversation if its tokenizer has a chat template, else with the text as it is.

    Raises:
        UserError: the tokenizer cannot be used.
    """
    check_tokenizer(tokenizer, name=_name(tokenizer))
    chat_template = _own_template(tokenizer)
    eos_id = int(tokenizer.eos_token_id)
    prompt_format = PromptFormat(
        kind="chat" if chat_template else "template",
        prompt_template="",
        completion_template="",
        chat_template=chat_template,
        parses_special_tokens=True,
        bos_id=find_bos_id(tokenizer),
        eos_id=eos_id,
        stop_ids=(eos_id,),
        task=Task(kind="text"),
        tokenizer_hash=hash_tokenizer(tokenizer),
        is_turn_by_turn=bool(chat_template) and rewrites_turns(tokenizer, chat_template),
    )
    return replace(prompt_format, stop_ids=find_stop_ids(tokenizer, prompt_format))


def _find_chat_template(settings: Settings, tokenizer: PreTrainedTokenizerFast, row_format: RowFormat) -> str:
    """The Jinja source for conversations: the user's own text or file, or the tokenizer's."""
    own = settings.chat_template
    if row_format.kind not in ("messages", "answer_messages"):
        if own:
            raise UserError(
                "`chat_template` is set, and the data has no conversations to use it on",
                next_step="remove it, or give the data a column `messages`",
            )
        return ""
    if own:
        if "{{" in own or "{%" in own:
            return str(own).removeprefix("\ufeff")
        try:
            text = expand(own).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"`chat_template: {own}` is not UTF-8 text (byte {error.start + 1})", next_step="save it as UTF-8"
            ) from None
        except OSError as error:
            raise UserError(
                f"`chat_template: {own}` is neither a template nor a file that can be read",
                where=str(error.strerror or error),
                next_step="write the path of a .jinja file, or the template itself",
            ) from None
        if not text.strip():
            raise UserError(
                f"`chat_template: {own}` is empty",
                next_step="write a template into it, or remove the key: the tokenizer's own is taken then",
            )
        return text
    template = _own_template(tokenizer)
    if not template:
        raise UserError(
            "the data holds conversations, and the tokenizer of this model has no chat template",
            next_step="chat_template: FILE.jinja, or take the instruction-tuned model of the family",
        )
    return template


def _find_system_prompt(settings: Settings, *, is_chat: bool) -> str:
    if settings.chat_system_prompt and not is_chat:
        raise UserError(
            "`chat_system_prompt` is set, and the data has no conversations to put it before",
            where=settings.where("chat_system_prompt"),
            next_step="write it into `prompt_template`, or give the data a column `messages`",
        )
    return settings.chat_system_prompt or ""


def _is_bare(row_format: RowFormat) -> bool:
    """Whether answers that are compared come with whole prompts, made elsewhere."""
    return row_format.kind == "answers" and not row_format.prompt_template


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's chat template; empty if it has none. Some have several by name."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    # A file that an editor saved with a mark of its own at the beginning would put that mark into every prompt.
    return str(template or "").removeprefix("\ufeff")


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.name_or_path or "the model")
