"""The scale of each module, from wherever its dialect keeps it; two places at odds are an error."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from adapterops import casts
from adapterops.errors import FormatError, IncompatibleError
from adapterops.formats import diffusers, kohya, mlx, peft
from adapterops.formats.model import Site

_Scale = tuple[float, float, str]  # scale, the alpha it was made from, where that was found


class ScaleFinder:
    """Finds each module's scale, and that no two places contradict each other."""

    def __init__(
        self,
        path: str,
        metadata: Mapping[str, str],
        alpha: float | None,
        alpha_wins: bool,
    ) -> None:
        self._path = path
        self._metadata = metadata
        self._alpha = alpha
        self._alpha_wins = alpha_wins
        self._configs: list[tuple[str, dict[str, peft.Scales]]] = []
        self._known: dict[tuple[str, int], list[_Scale]] = {}
        self._mlx: list[_Scale] = []
        self.notes: list[str] = []

    def add_config(self, config: Mapping[str, Any], where: str) -> None:
        """Take `config` for a source of scales; a diffusers config has a part per component."""
        scales = {
            part: peft.Scales(diffusers.component_config(config, part), where, self.notes)
            for part in diffusers.components(config)
        }
        self._configs.append((where, scales))
        self._mlx += mlx.scales(config, where)

    def scaled(self, site: Site) -> Site:
        """The site with its scale and where it came from."""
        if self._alpha is not None and self._alpha_wins:
            return self._given(site, self._alpha)
        found = [*self._from_tensor(site), *self._from_config(site), *self._from_header(site)]
        for scale, _, origin in found[1:]:
            if not math.isclose(scale, found[0][0], rel_tol=_tolerance(site)):
                raise IncompatibleError(
                    f"two scales disagree: {found[0][0]:.6g} by {found[0][2]}, "
                    f"{scale:.6g} by {origin}",
                    path=self._path,
                    module=site.stem,
                    hint=f"say which with --alpha {self._path}=X",
                )
        if found:
            scale, alpha, origin = found[0]
            return site.scaled(scale, alpha, origin)
        if self._alpha is not None:
            return self._given(site, self._alpha)
        if site.dialect in ("peft", "mlx"):
            name = "lora_alpha" if site.dialect == "peft" else "lora_parameters.scale"
            raise IncompatibleError(
                f"no scale: no adapter_config.json says {name}, and there is no alpha anywhere",
                path=self._path,
                hint="give the alpha it was trained with: --alpha X",
            )
        return site.scaled(1.0, None, "assumed (no alpha: alpha = rank)")

    def _from_tensor(self, site: Site) -> Iterator[_Scale]:
        ref = site.parts.get("alpha")
        if ref is None:
            return
        if math.prod(ref.shape) != 1:
            raise FormatError(
                f"{ref.name!r} has shape {list(ref.shape)}, expected one number", path=self._path
            )
        value = casts.number(ref.raw(), ref.dtype)
        if not math.isfinite(value):
            raise FormatError(f"{ref.name!r} is {value}", path=self._path)
        if value == 0.0 and site.dim:
            raise IncompatibleError(
                "alpha is 0, which some loaders read as alpha = rank and others as no effect",
                path=self._path,
                module=site.stem,
                hint=f"say what is meant with --alpha {self._path}=X",
            )
        if not site.dim:  # LyCORIS' LoKr of two full matrices
            yield 1.0, value, "assumed (alpha is not used where both matrices are full)"
        else:
            yield value / site.dim, value, f"alpha {value:g} / rank {site.dim}"

    def _from_config(self, site: Site) -> Iterator[_Scale]:
        if site.dialect == "mlx":
            yield from self._mlx
            return
        part = diffusers.component(site.stem) if site.dialect == "diffusers" else ""
        found = None if site.owned else self._known.get((part, site.dim))
        if found is None:
            found = list(self._configured(site))
            plain = not any(scales.has_patterns for _, scales in self._scales_of(site))
            if plain and not site.owned:
                self._known[part, site.dim] = found
        yield from found

    def _configured(self, site: Site) -> Iterator[_Scale]:
        """What each config says; without patterns the same of all modules of one rank."""
        module = self._configured_name(site)
        for where, scales in self._scales_of(site):
            if not scales.known:
                continue
            expected = scales.rank(module, site.dim)
            if expected is not None and expected != site.dim and site.dim:
                raise IncompatibleError(
                    f"the config says r={expected:g}, its tensors have rank {site.dim}, so "
                    "alpha / r is unknown",
                    path=self._path,
                    module=site.stem,
                    hint=f"correct rank_pattern in the config, or give --alpha {self._path}=X",
                )
            origin = f"{scales.alpha_key} in {os.path.basename(where)}"
            alpha, rank = scales.alpha(module), site.dim or int(expected or 0)
            self._check_meant(site, scales, alpha)
            yield scales.scaled(alpha, rank), alpha, origin

    def _configured_name(self, site: Site) -> str:
        """What a config calls a module: without its component, an expert by its parameter."""
        if site.meant:
            return f"{site.owner}.{site.meant[0]}"
        part = diffusers.component(site.stem) if site.dialect == "diffusers" else ""
        return site.stem.removeprefix(part + ".") if part else site.stem

    def _scales_of(self, site: Site) -> Iterator[tuple[str, peft.Scales]]:
        """Each config's scales for the component of a module."""
        part = diffusers.component(site.stem) if site.dialect == "diffusers" else ""
        for where, parts in self._configs:
            scales = parts.get(part, parts[""])
            yield where, scales if scales.known else parts[""]

    def _check_meant(self, site: Site, scales: peft.Scales, alpha: float) -> None:
        """Which of a module's parameters a nested pair belongs to is not in the file."""
        for parameter in site.meant[1:]:
            other = scales.alpha(f"{site.owner}.{parameter}")
            if other != alpha:
                raise IncompatibleError(
                    f"MoE target_parameters are ambiguous: alpha is {alpha:g} for "
                    f"{site.meant[0]} and {other:g} for {parameter}, and which of them this pair "
                    "adapts is not in the file",
                    path=self._path,
                    module=site.stem,
                    hint="different ranks for the two (rank_pattern) would tell them apart",
                )

    def _given(self, site: Site, alpha: float) -> Site:
        """The scale that the user's alpha means: by the config's rule where there is one."""
        scales = next((scales for _, scales in self._scales_of(site)), None)
        if scales is not None and site.dialect != "mlx":
            expected = scales.rank(self._configured_name(site), site.dim)
            scale = scales.scaled(alpha, site.dim or int(expected or 0))
        else:
            scale = alpha / site.dim if site.dim else 1.0
        return replace(
            site,
            scale=scale,
            alpha=alpha,
            alpha_given=True,
            scale_from=f"--alpha {alpha:g}{_divided(alpha, scale, site.dim)}",
        )

    def _from_header(self, site: Site) -> Iterator[_Scale]:
        if not site.dim or not self._metadata:
            return
        if site.dialect == "kohya":
            spatial = any(extent != 1 for extent in site.kernel)
            alpha = kohya.header_alpha(self._metadata, site.dim, spatial)
            if alpha is not None:
                yield alpha / site.dim, alpha, "ss_network_alpha"
            return
        part = diffusers.component(site.stem)
        prefix = f"{part}." if part and f"{part}.lora_alpha" in self._metadata else ""
        text = self._metadata.get(f"{prefix}lora_alpha") or self._metadata.get("alpha")
        if text is None:
            return
        rank_text = self._metadata.get(f"{prefix}r") or self._metadata.get("rank")
        try:
            alpha, rank = float(text), float(rank_text) if rank_text else float(site.dim)
        except ValueError:
            raise FormatError(
                f"the header's alpha {text!r} or rank {rank_text!r} is no number", path=self._path
            ) from None
        if math.isfinite(alpha) and rank == site.dim:
            yield alpha / site.dim, alpha, "alpha in the header"


def _divided(alpha: float, scale: float, rank: int) -> str:
    """How a scale was made from an alpha, in words."""
    if rank and math.isclose(scale, alpha / rank):
        return f" / rank {rank}"
    if rank and math.isclose(scale, alpha / math.sqrt(rank)):
        return f" / √{rank} (use_rslora)"
    return ", by the config's rule"


def _tolerance(site: Site) -> float:
    """Two sources of a scale agree up to the rounding of a stored alpha."""
    ref = site.parts.get("alpha")
    return {"F16": 2.0**-10, "BF16": 2.0**-7}.get(ref.dtype if ref else "", 1e-6)
