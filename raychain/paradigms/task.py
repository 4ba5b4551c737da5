"""`task:` of an experiment: which paradigm it is of, with that paradigm's options."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from raychain.core.json import Json
from raychain.schema.component import Component


class Task(Component):
    """The paradigm by name; a paradigm's own options stand beside it in a subclass."""

    paradigm: str = "clip"

    @property
    def identity(self) -> Json:
        """What of it is part of a stage's key: all that a model's configuration and its reader do not say."""
        return self.model_dump(mode="json")


def _known(value: object) -> Task:
    from raychain.paradigms import make_task  # which knows the installed packages

    return make_task(value)


AnyTask = Annotated[SerializeAsAny[Task], BeforeValidator(_known)]
"""The options of whichever paradigm is named."""
