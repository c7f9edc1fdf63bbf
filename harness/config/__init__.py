"""YAML files and `section.key=value` in, validated pydantic sections out.

Every room declares its own section next to the code that uses it; `harness/settings.py` joins them. Read section.py
first (what a section is), then load.py (how values reach it and what a mistake is told).
"""

from .dump import dump_yaml, plain
from .errors import ConfigError, HarnessError
from .load import field_names, load_config, read_yaml, sections_in, validate
from .section import Section

__all__ = [
    "ConfigError",
    "HarnessError",
    "Section",
    "dump_yaml",
    "field_names",
    "load_config",
    "plain",
    "read_yaml",
    "sections_in",
    "validate",
]
