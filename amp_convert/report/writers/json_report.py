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

SCHEMA_FILE = "report.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _StrictNumbers(GenerateJsonSchema):
    """Says in the schema what `ser_json_inf_nan="strings"` does to a number."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["NaN", "Infinity", "-Infinity"]}]}


def _unwrapped(schema: Any) -> Any:
    """The schema with each description on one line, so that its docstring may be wrapped anew."""
    if isinstance(schema, list):
        return [_unwrapped(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: " ".join(value.split())
        if key == "description" and isinstance(value, str)
        else _unwrapped(value)
        for key, value in schema.items()
    }


def json_text(report: Section) -> str:
    """The report as strict JSON (RFC 8259), two spaces of indent, with a final newline."""
    return report.model_dump_json(indent=2) + "\n"


def schema_text() -> str:
    """The JSON Schema (draft 2020-12) of report.json, as committed in `report.schema.json`."""
    schema = RunReport.model_json_schema(schema_generator=_StrictNumbers)
    return json.dumps({"$schema": DIALECT, **_unwrapped(schema)}, indent=2) + "\n"
