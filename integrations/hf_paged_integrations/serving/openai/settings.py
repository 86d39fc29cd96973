"""ServerSettings: limits, names and keys of a server."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The limits of a server, and who may use it.

    Attributes
    ----------
    model_name : str
        By which requests ask for the model.
    api_key : str or None
        Every request under ``/v1`` must bring it; None: it needs none.
    tenant_header : str or None
        The header by which a proxy that is trusted names the tenant of a request. Tenants do not find each other's
        blocks. None: no header is looked at.
    max_running, max_queue : int
        Requests that run at the same time, and that wait. One more is refused.
    max_prompt_tokens : int or None
        Of one prompt; None: as many as the model's context takes.
    max_new_tokens : int
        Of one answer.
    max_choices : int
        Answers of one request: its prompts times ``n``.
    max_body_bytes : int
        Of one request.
    request_seconds : float
        After which a request is ended.
    drain_seconds : float
        That requests under way may still take when the server shuts down.

    Raises
    ------
    ValueError
        If one of the numbers is out of range.
    """

    model_name: str
    api_key: str | None = field(default=None, repr=False)
    tenant_header: str | None = None
    max_running: int = 128
    max_queue: int = 512
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    max_choices: int = 16
    max_body_bytes: int = 8 * 2**20
    request_seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self):
        least = {"max_queue": 0, "drain_seconds": 0, "request_seconds": 0}
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}; got {value}")
        for name in ("api_key", "tenant_header"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty: give one, or leave it out")
