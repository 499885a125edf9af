"""Which model each tenant's requests name, the salts that keep its cache apart, a router's config.

An engine's prefix cache is keyed by adapter, not by tenant: tenants that share one could tell from
the time of a first token what another has asked. A random `cache_salt` in every request ends that.
vLLM 0.33 puts adapter name and salt untagged into one hash (issue #44701), so a salt begins with
"salt:", which no adapter's name does.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterops.errors import FormatError, UsageError
from adapterops.files.source import LocalFile, read_bytes

ROUTES = "routes.json"
ROUTER = "litellm.yaml"
SCHEMA = "adapterops.routes/1"
SALTED = frozenset({"vllm", "sglang", "trtllm", "portable"})  # engines whose requests take one
_PROVIDER = {"vllm": "hosted_vllm"}  # of LiteLLM; "openai" is any other server of that protocol
_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Route:
    """One tenant's way: the adapter's name, None for the base model, and what a request must say.

    `request` are fields of the body of an OpenAI-style request, `model` among them.
    """

    adapter: str | None
    request: Mapping[str, Any]

    @property
    def salt(self) -> str | None:
        """Its cache_salt, None where it has none."""
        found = self.request.get("cache_salt")
        return found if isinstance(found, str) else None


def routes(
    engine: str,
    base: str,
    adapters: Mapping[str, str | None],
    shared: frozenset[str],
    folder: str,
    previous: Mapping[str, Route],
) -> dict[str, Route]:
    """tenant -> route, for `adapters`, tenant -> name or None for the base model.

    Those in `shared` get a salt where the engine takes one. It is new and random, from the
    operating system's generator, so no two runs give the same; a tenant that `previous` routed to
    the same adapter keeps its salt and with it its cached prefixes. One that moves gets a new one:
    its old blocks are of no use to it, and a salt that lived shorter says less. `folder` is where
    the adapters will be.
    """
    found = {}
    for tenant, name in adapters.items():
        request = _request(engine, base, name, folder)
        if tenant in shared and engine in SALTED:
            old = previous.get(tenant)
            kept = old.salt if old is not None and old.adapter == name else None
            request["cache_salt"] = kept or f"salt:{secrets.token_hex(_SALT_BYTES)}"
        found[tenant] = Route(name, request)
    return found


def _request(engine: str, base: str, name: str | None, folder: str) -> dict[str, Any]:
    """The fields by which a request names an adapter.

    SGLang: `base:adapter` (`entrypoints/openai/serving_base.py: _parse_model_parameter`); LoRAX:
    the adapter's path as its id; TGI: the adapter's name, "tgi" for none; TensorRT-LLM: a
    `lora_request`, whose number must not be used again for other content.
    """
    if name is None:
        return {"model": "tgi" if engine == "tgi" else base}
    path = os.path.join(folder, name)
    if engine == "sglang":
        return {"model": f"{base}:{name}"}
    if engine == "lorax":
        return {"model": path}
    if engine == "trtllm":
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        lora = {"lora_name": name, "lora_int_id": number, "lora_path": path}
        return {"model": base, "lora_request": lora}
    return {"model": name}


def encode(
    engine: str, base: str, found: Mapping[str, Route], left: Mapping[str, str], content: str
) -> bytes:
    """routes.json. `content` identifies the deployment's adapters."""
    document = {
        "schema": SCHEMA,
        "engine": engine,
        "base": base,
        "content": content,
        "routes": {
            tenant: {"adapter": route.adapter, "request": route.request}
            for tenant, route in sorted(found.items())
        },
        "not_deployed": dict(sorted(left.items())),
    }
    return json.dumps(document, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def router(engine: str, found: Mapping[str, Route]) -> bytes:
    """LiteLLM's proxy config: every tenant as a model of its own.

    The engine is at $API_BASE; $API_KEY is its key, any text where it asks for none.
    """
    import yaml

    provider = _PROVIDER.get(engine, "openai")
    models = []
    for tenant, route in sorted(found.items()):
        more = {key: value for key, value in route.request.items() if key != "model"}
        params: dict[str, Any] = {
            "model": f"{provider}/{route.request['model']}",
            "api_base": "os.environ/API_BASE",
            "api_key": "os.environ/API_KEY",
        }
        if more:
            params["extra_body"] = more
        models.append({"model_name": tenant, "litellm_params": params})
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = yaml.dump({"model_list": models}, Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text.encode("utf-8", "replace")


def read(folder: str | os.PathLike[str]) -> dict[str, Route]:
    """The routes of an earlier deployment.

    Raises FileError where there is none, FormatError for what is none, UsageError for one of
    another version.
    """
    path = Path(folder) / ROUTES
    file = LocalFile(path)
    try:
        document = json.loads(bytes(read_bytes(file, 0, file.size())))
        schema = str(document["schema"])
        if schema.startswith("adapterops.routes/") and schema != SCHEMA:
            raise UsageError(f"{path} has {schema}, this version reads {SCHEMA}")
        if schema != SCHEMA:
            raise ValueError("its schema is another")
        return {
            str(tenant): Route(_name(entry["adapter"]), dict(entry["request"]))
            for tenant, entry in document["routes"].items()
        }
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"is no routes.json of adapterops ({error})", path=path) from None
    finally:
        file.close()


def _name(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is no adapter")
    return value
