"""Where a run is pushed to, and whether its token may write there. This is asked before step 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import screen
from slimpajama_hf.corpus import hub_files
from slimpajama_hf.errors import UsageError, UserError

if TYPE_CHECKING:
    from slimpajama_hf.settings.settings import Settings


#: Checkpoints that may wait with `all_checkpoints`. With the other strategies only the newest waits.
MOST_WAITING = 8

#: How to get a token: the end of the message when none may write.
_GET_ONE = "make one at https://huggingface.co/settings/tokens and type `hf auth login`, or set HF_TOKEN"


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where checkpoints go, and which parts of them."""

    repo: str
    """`owner/name`; only a name as long as the Hub has not said who owns the token."""
    token: str = dataclasses.field(repr=False)
    private: bool | None = None
    """None: as the account is set up."""
    revision: str | None = None
    """Branch; None: main."""
    strategy: str = "checkpoint"
    license: str | None = None

    @property
    def most(self) -> int:
        """How many checkpoints may wait in the outbox."""
        return MOST_WAITING if self.strategy == "all_checkpoints" else 1

    @property
    def with_state(self) -> bool:
        """Whether the files that resuming needs are pushed too."""
        return self.strategy in ("checkpoint", "all_checkpoints")

    def words(self) -> str:
        """Words for the plan: `me/run, every checkpoint with what resuming needs`."""
        kind = " (private)" if self.private else ""
        branch = f" at {self.revision}" if self.revision else ""
        when = "the last checkpoint" if self.strategy == "end" else "every checkpoint"
        needs = " with what resuming needs" if self.with_state else ", the model alone"
        return f"{self.repo}{kind}{branch}, {when}{needs}"


def destination(settings: Settings) -> Destination | None:
    """Return where this run is pushed to; None without `--push_to_hub`.

    Raises UserError for a token that is missing, refused or may not write. If the Hub does not answer, the screen says
    so, and the run goes on.
    """
    training = settings.training
    if not training.push_to_hub:
        return None
    if settings.run.no_checkpoint or str(getattr(training.save_strategy, "value", training.save_strategy)) == "no":
        raise UsageError("--push_to_hub: checkpoints are what is pushed, and none is saved; leave --no-checkpoint out")
    return resolve(
        training.hub_model_id or Path(settings.output_dir).resolve().name,
        training.hub_token,
        private=training.hub_private_repo,
        revision=training.hub_revision,
        strategy=str(training.hub_strategy.value),
        license=settings.run.hub_license,
    )


def resolve(repo: str, token: str | None, **more: Any) -> Destination:
    """Return the checked destination with that name; see `destination`."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--hub_model_id {repo}: {_first_sentence(error)}; expected owner/name") from None
    token = token or get_token()
    screen.keep_secret(token)
    if not token:
        raise UserError(f"--push_to_hub: there is no Hub token on this machine; {_GET_ONE}")
    try:
        account = _whoami(token)
    except Exception as error:
        status = hub_files.status_of(error)
        if status in (401, 403):
            raise UserError(
                f"--push_to_hub: the Hub refuses the token (HTTP {status}); expected one that may write: {_GET_ONE}"
            ) from None
        screen.say(
            f"--push_to_hub: the Hub does not answer ({why(error)}); checkpoints wait in the run's folder until it does"
        )
        return Destination(repo, token, **more)
    owner, slash, _ = repo.partition("/")
    if not slash:
        owner, repo = account["name"], f"{account['name']}/{repo}"
    _refuse_without_rights(account, owner, repo)
    return Destination(repo, token, **more)


def _whoami(token: str) -> dict[str, Any]:
    """Ask whose token it is and what it may do. `HfApi.whoami` is not used because it has no time limit."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    response = get_session().get(
        f"{HfApi().endpoint}/api/whoami-v2", headers=build_hf_headers(token=token), timeout=hub_files.REQUEST_TIMEOUT
    )
    hf_raise_for_status(response)
    return response.json()


def _refuse_without_rights(account: dict[str, Any], owner: str, repo: str) -> None:
    """Raise UserError if the Hub says that the token cannot write to `repo`."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        raise UserError(f"--push_to_hub: the Hub token of {account['name']} may only read; expected write: {_GET_ONE}")
    organizations = {each.get("name"): each.get("roleInOrg") for each in account.get("orgs") or []}
    if owner != account["name"] and owner not in organizations:
        raise UserError(
            f"--hub_model_id {repo}: the Hub token is of {account['name']}, who is not in {owner}; expected one of "
            f"{', '.join([account['name'], *map(str, organizations)])} before the /"
        )
    if organizations.get(owner) == "read":
        raise UserError(f"--hub_model_id {repo}: {account['name']} may only read in {owner}; ask there for write")
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if role == "fineGrained" and scopes is not None:
        named = {(scope.get("entity") or {}).get("name"): scope.get("permissions") or [] for scope in scopes}
        permissions = [*named.get(owner, []), *named.get(repo, [])]
        if not any(each.startswith("repo") and "write" in each for each in permissions):
            raise UserError(
                f"--push_to_hub: the fine-grained Hub token of {account['name']} may not write to {repo}; add that "
                f"permission, or {_GET_ONE}"
            )


def why(error: BaseException) -> str:
    """Describe a failure of the Hub in a few words, without a library's page of text."""
    status = hub_files.status_of(error)
    if status is not None:
        return hub_files.status_words(status)
    passing = hub_files.passing(error)
    if passing is not None:
        return passing
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    return screen.redacted(f"{type(error).__name__}: {_first_sentence(error)}")


def _first_sentence(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 200 else line[:197] + "..."
