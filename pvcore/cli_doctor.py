"""`pvcore doctor`: what is installed, what this machine can run, what a model supports."""

from typing import Annotated

from typer import Argument

from pvcore.cli_options import AsJson
from pvcore.cli_output import print_document

Model = Annotated[
    str | None, Argument(help="Name or folder of a model to look at; 'world' is the shipped one.")
]


def doctor(model: Model = None, as_json: AsJson = False) -> None:
    """Say what is installed, what this machine can run, and what a model supports.

    Looks at configuration and tokenizer only: no weights are loaded, and nothing is run.
    """
    from pvcore import doctor as diagnosis
    from pvcore import world

    document = {"installed": diagnosis.installed(), "machine": diagnosis.machine()}
    if model is not None:
        document["model"] = diagnosis.model(world.path() if model == "world" else model)
    print_document(document, as_json)
