"""``timm-sfr push RUN USER/NAME``: publishes a finished run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from timm_sfr.cli.parser import PUSH_FAILED, fail
from timm_sfr.utils.errors import HubError

WHAT = "Publish a finished run on the Hugging Face Hub. Uses the token of `hf auth login` or HF_TOKEN."


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository; created if it does not exist")
    parser.add_argument(
        "--private", "--hub-private", action="store_true", help="make a newly created repository private"
    )
    parser.add_argument("--revision", "--hub-revision", help="branch to publish on (default: main)")
    parser.add_argument("--commit-message", help="title of the commit")
    parser.add_argument("--hub-license", help="licence of the weights (default: what the run recorded)")


def run(args: Namespace) -> int:
    """Runs the command; returns 0, or 3 if the upload fails."""
    from timm_sfr.hub.push import published, push_to_hub
    from timm_sfr.utils.console import show_log

    show_log()
    try:
        url = push_to_hub(
            args.run_folder,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            commit_message=args.commit_message,
            license=args.hub_license,
        )
    except HubError as error:
        return fail(str(error), PUSH_FAILED)
    print(published(args.run_folder, url, args.repo_id, args.revision))
    return 0
