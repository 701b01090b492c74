"""``timm-sfr push RUN USER/NAME``: publishes a finished run."""

from __future__ import annotations

from argparse import Namespace

from timm_sfr.cli.parser import PUSH_FAILED, fail
from timm_sfr.utils.errors import HubError


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
            space=args.repo_id if args.space == "" else args.space,
        )
    except HubError as error:
        return fail(str(error), PUSH_FAILED)
    print(published(args.run_folder, url, args.repo_id, args.revision))
    return 0
