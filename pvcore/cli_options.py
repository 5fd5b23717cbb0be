"""Options that several commands take, under one name and with one meaning."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Model = Annotated[
    str, Argument(help="Name or folder of a chat model; 'world' is the one shipped with pvcore.")
]
VectorFiles = Annotated[list[Path], Option("--vector", help="Vector file; may be repeated.")]
Layers = Annotated[str | None, Option(help="Layers from 0, as in 15,19; default: all.")]
System = Annotated[str | None, Option(help="System prompt, put before every chat given here.")]
Length = Annotated[int, Option(help="Longest reply, in tokens.")]
Batch = Annotated[int, Option(help="Chats that run together.")]
Temperature = Annotated[float, Option(help="Of sampling; 0 is greedy.")]
Seed = Annotated[int, Option(help="Seed of everything that is sampled.")]
Dtype = Annotated[str, Option(help="Number format to load models in.")]
Device = Annotated[str | None, Option(help="Where to run; default: a GPU if there is one.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON document and nothing else.")]
