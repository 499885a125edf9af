"""Exact errors of serving newcomers by representatives of a plan, of the files as they are now."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from adapterops.activations import Activations
from adapterops.errors import AdapterOpsError
from adapterops.files.remote import located
from adapterops.fleet.plans import planfile
from adapterops.fleet.plans.plan import Representative
from adapterops.fleet.replanning.joining import Newcomer
from adapterops.fleet.verifying.exact import Error, compare_many
from adapterops.stream import Compute


class Against:
    """What `replanning.assign` verifies by; what cannot be used is told to `warnings`."""

    def __init__(
        self,
        plan: str | os.PathLike[str],
        newcomers: Sequence[Newcomer],
        activations: Activations | None,
        on: Compute,
        allow_pickle: bool,
        warnings: list[str],
    ) -> None:
        self._plan, self._activations, self._on = plan, activations, on
        self._allow_pickle, self._warnings = allow_pickle, warnings
        self._places = {item.tenant.name: item.tenant.location for item in newcomers}

    def __call__(
        self, rep: Representative, names: Sequence[str]
    ) -> Mapping[str, Error | AdapterOpsError]:
        """The errors of the tenants `names` if `rep` served them."""
        with ExitStack() as stack:

            def local(place: str) -> str:
                return stack.enter_context(located(place, allow_pickle=self._allow_pickle))

            try:
                server = local(planfile.located(self._plan, rep.location, rep.path))
                places = [local(self._places[name]) for name in names]
                errors = compare_many(
                    server,
                    places,
                    self._on,
                    activations=self._activations,
                    allow_pickle=self._allow_pickle,
                )
                return dict(zip(names, errors, strict=True))
            except AdapterOpsError as error:
                self._warnings.append(f"{rep.id} cannot be used: {error}")
                return dict.fromkeys(names, error)
