"""`schema`: print the JSON schema of configuration files, for editors."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "the JSON schema of the YAML configurations, for editors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no flags."""
    parser.description = "Writes the schema to stdout. configs/schema.json is the same; configs/*.yaml name it."


def main(options: argparse.Namespace) -> int:
    from slimpajama_hf.settings import schema

    sys.stdout.write(json.dumps(schema.schema(), indent=1, ensure_ascii=False) + "\n")
    return 0
