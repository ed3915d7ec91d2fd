"""Every configuration key as an option: `trietune train FILE --learning-rate 1e-4 --use-dora lora_r=16 -c MORE.yaml`.

What is typed becomes `--set KEY=VALUE`, in its order, before the command reads it; so the last one written wins, and
there is one reader of values. The options that `--help` lists are made from the settings when it is asked for.

    --learning-rate 1e-4      --set learning_rate=1e-4        also --learning_rate, and --learning-rate=1e-4
    --use-dora                --set use_dora=True             --no-use-dora: False
    lora_r=16                 --set lora_r=16
    --model X --data Y        --set model_name=X --set train_file=Y     dataset_id=Y if there is no such file
    -c MORE.yaml              the file, or on top of another one --set of each of its keys
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer.core import TyperCommand

if TYPE_CHECKING:
    from typer._click.core import Context, Parameter

# `typed_keys` loads the settings, which `trietune --help` and commands without keys do not need.


class CommandWithKeys(TyperCommand):
    """A command that takes configuration keys in every form."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Read the command line, keys turned into `--set`."""
        own = {name: _num_values(param) for param in super().get_params(ctx) for name in param.opts}
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        from trietune.cli.typed_keys import keys_as_set

        return super().parse_args(ctx, keys_as_set(args, own, command=str(self.name)))

    def get_params(self, ctx: Context) -> list[Parameter]:
        """The command's own parameters, and an option for each key."""
        from trietune.cli.typed_keys import TRAINS, key_options

        own = super().get_params(ctx)
        taken = {name for param in own for name in param.opts}
        return [*own, *(key for key in key_options(takes_data=self.name in TRAINS) if not taken & {*key.opts})]


def complete_set(incomplete: str) -> list[tuple[str, str]]:
    """For shells: what may stand after `--set`."""
    from trietune.cli.typed_keys import complete_assignment

    return complete_assignment(incomplete)


def _num_values(param: object) -> int:
    return 0 if getattr(param, "is_flag", False) or getattr(param, "count", False) else 1
