"""Publishes a finished run: ``python -m timm_sfr.push RUN USER/NAME``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from timm_sfr.cli import PUSH_FAILED, Parser, fail
from timm_sfr.errors import HubError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, 2 for a mistake, 3 where the Hub is in the way."""
    from timm_sfr.hub import published, push_to_hub
    from timm_sfr.workspace import show_log

    parser = Parser(
        prog="python -m timm_sfr.push",
        description="Publish a finished run on the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository; made if it is missing")
    parser.add_argument(
        "--private", "--hub-private", action="store_true", help="make the repository private, if it is made now"
    )
    parser.add_argument("--revision", "--hub-revision", help="branch to publish on (default: main)")
    parser.add_argument("--commit-message", help="title of the commit")
    parser.add_argument("--hub-license", help="licence of the weights (default: what the run recorded)")
    show_log()
    try:
        args = parser.parse_args(arguments)
        url = push_to_hub(
            args.run,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            commit_message=args.commit_message,
            license=args.hub_license,
        )
    except HubError as error:
        return fail(str(error), PUSH_FAILED)
    except UserError as error:
        return fail(str(error))
    print(published(args.run, url, args.repo_id, args.revision))
    return 0


if __name__ == "__main__":
    sys.exit(main())
