"""report.json, the report that programs read, and its published JSON Schema.

`report.schema.json` beside this file is generated from the models; after changing one, write
`schema_text()` into it.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from amp_convert.report.model import RunReport, Section
from amp_convert.verdict.verdict import Verdict

SCHEMA_FILE = "report.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


_WIDTH = 88
SCHEMA_ID = "urn:amp-convert:report:1"
_NUMBER = [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]
"""A number, and the text that stands for one that JSON lacks."""


class _StrictNumbers(GenerateJsonSchema):
    """Says in the schema what `ser_json_inf_nan="strings"` does to a number."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), _NUMBER[1]]}


def _tidied(schema: Any, *, in_properties: bool = False) -> Any:
    """The schema with each description on one line, so that its docstring may be wrapped anew,
    without the titles that only repeat a key, and with one definition of a number."""
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("anyOf", [])[:2] == _NUMBER:
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "title")}
        number = {"$ref": "#/$defs/Number"}
        others = schema["anyOf"][2:]
        return rest | ({"anyOf": [number, *others]} if others else number)
    return {
        key: " ".join(value.split())
        if key == "description" and isinstance(value, str)
        else _tidied(value, in_properties=key in ("properties", "$defs"))
        for key, value in schema.items()
        if in_properties or key != "title"
    }


def json_text(report: Section) -> str:
    """The report as strict JSON (RFC 8259), two spaces of indent, with a final newline."""
    return report.model_dump_json(indent=2) + "\n"


class _OfRun(Section):
    verdict: Verdict


def verdict_text(verdict: Verdict) -> str:
    """A verdict alone, as it stands in the report."""
    return json_text(_OfRun(verdict=verdict))


def schema_text() -> str:
    """The JSON Schema (draft 2020-12) of report.json, as committed in `report.schema.json`."""
    schema = RunReport.model_json_schema(schema_generator=_StrictNumbers)
    tidied = _tidied(schema)
    tidied["$defs"]["Number"] = {"anyOf": _NUMBER}
    head = {"$schema": DIALECT, "$id": SCHEMA_ID, "title": "An amp-convert report"}
    return _laid_out({**head, **tidied}) + "\n"


def _laid_out(value: Any, indent: str = "") -> str:
    """JSON for people: what fits on a line stands on one."""
    short = json.dumps(value)
    if not isinstance(value, dict | list) or len(indent) + len(short) <= _WIDTH:
        return short
    deeper = f"{indent}  "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_laid_out(v, deeper)}" for key, v in value.items()]
        return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _laid_out(v, deeper) for v in value) + f"\n{indent}]"
