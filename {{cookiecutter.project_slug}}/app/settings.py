"""Every setting of the service: its environment variable is its name in capitals.

Sources, the first one wins: the environment, `.env`, `[tool.service]` in pyproject.toml.
"""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    PyprojectTomlConfigSettingsSource,
    SettingsConfigDict,
)

from app.errors import StartupError
from app.predictor import Device

SHUTDOWN_RESERVE_S = 5
"""The part of the shutdown grace kept for closing connections and the end of the lifespan."""


ROUTE = r"^/[^{}?#\s]*$"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=".env",
        pyproject_toml_table_header=("tool", "service"),
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
    )

    service_title: str = "Model service"
    """Name of the service, shown in the API docs."""

    service_description: str = ""
    """One sentence on what the service answers, shown in the API docs."""

    bind_address: str = "0.0.0.0"
    """Address to listen on; 127.0.0.1 keeps it to this machine."""

    port: int = Field(default=8080, ge=1, le=65_535)
    """Port to listen on."""

    aip_http_port: int | None = Field(default=None, ge=1, le=65_535)
    """The port in place of PORT; Vertex AI sets it."""

    aip_predict_route: str | None = Field(default=None, pattern=ROUTE)
    """A path that takes `instances` for the default model; Vertex AI sets it."""

    aip_health_route: str | None = Field(default=None, pattern=ROUTE)
    """A path that says what `/ready` says; Vertex AI sets it."""

    web_concurrency: int = Field(default=1, ge=1, le=256)
    """Worker processes. Each one loads every model: one per GPU, and scale by replicas."""

    device: Device = "auto"
    """`auto` takes a GPU where there is one; `cuda` refuses to start without; `cpu`."""

    nvidia_visible_devices: str = ""
    """The GPUs that the container was given; the image for CUDA sets it to `all`."""

    predictors_dir: Path = Path("predictors")
    """Folder with one file per model."""

    artifacts_dir: Path = Path("artifacts")
    """Folder with the model files, as `<model>/<version>/`."""

    default_model: str | None = None
    """The model behind /v1/predict; needed where there are several."""

    request_timeout_s: float = Field(default=10, gt=0, le=3600)
    """Seconds until a request is answered with 504; reading its body counts."""

    shutdown_grace_s: int = Field(default=30, ge=6, le=3600)
    """Seconds that a stopping service has for what it accepted; more than REQUEST_TIMEOUT_S."""

    max_body_bytes: int = Field(default=1024 * 1024, ge=1)
    """Largest request body."""

    max_instances: int = Field(default=1000, ge=1)
    """Most rows in one batch request."""

    batch_max_rows: int = Field(default=32, ge=1)
    """Most rows that a model is given at once; larger requests are split."""

    batch_max_wait_ms: float = Field(default=10, ge=0, le=10_000)
    """Longest that a row waits for others to share a batch with; 0: it never waits, and batches are
    smaller."""

    batch_policy: Literal["learned", "window"] = "learned"
    """`learned` waits only while it pays; `window` always waits BATCH_MAX_WAIT_MS."""

    queue_max_rows: int = Field(default=10_000, ge=1)
    """Most rows that wait for one model; beyond it requests are answered with 429."""

    queue_max_bytes: int = Field(default=256 * 1024 * 1024, ge=1)
    """Most bytes of bodies over 16 KiB that are read or wait, in each worker; beyond it, 429."""

    cache_enabled: bool = True
    """Whether equal rows are answered from the cache."""

    cache_ttl_s: float = Field(default=300, gt=0, le=30 * 24 * 3600)
    """Seconds for which a cached answer is given again."""

    cache_max_bytes: int = Field(default=64 * 1024 * 1024, ge=0)
    """Most memory for cached answers, in each worker."""

    redis_url: SecretStr | None = None
    """Where replicas share cached answers: `redis://user:password@host:6379/0`, `rediss://` with
    TLS, `unix://`. Redis or Valkey, one server: no Sentinel and no Cluster."""

    redis_timeout_ms: float = Field(default=50, gt=0, le=10_000)
    """Milliseconds after which a Redis that does not answer counts as a miss."""

    ready_cache_s: float = Field(default=5, ge=0, le=300)
    """Seconds for which the test prediction behind /ready is believed."""

    api_keys_sha256: Annotated[tuple[str, ...], NoDecode] = ()
    """SHA-256 hex digests of the accepted API keys, separated by commas; empty: no key needed."""

    drift_rows_per_s: int = Field(default=100, ge=0, le=1000)
    """Rows a second, of each model in each worker, whose values are looked at for drift; of more
    a random sample. 0: none."""

    otel_exporter_otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s]+$")
    """Where traces are sent, as OTLP over HTTP: `http://collector:4318`; empty: there are none."""

    status_page: bool = True
    """Whether / shows a browser the state of the service."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line to write."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """`auto` writes for a reader in a terminal, and JSON elsewhere."""

    @property
    def listening_port(self) -> int:
        return self.aip_http_port or self.port

    @property
    def expected_device(self) -> Device:
        """What models should run on: a container that was given GPUs is there for them."""
        has_gpus = self.nvidia_visible_devices not in ("", "void", "none")
        return "cuda" if self.device == "auto" and has_gpus else self.device

    @field_validator("api_keys_sha256", mode="before")
    @classmethod
    def _split_digests(cls, value: object) -> object:
        return value.lower().split(",") if isinstance(value, str) else value

    @field_validator("api_keys_sha256")
    @classmethod
    def _check_digests(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        digests = tuple(digest.strip() for digest in digests)
        for digest in digests:
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                raise ValueError("each key is given as its SHA-256, 64 hexadecimal digits")
        return digests

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url.get_secret_value())
            _ = parts.port
        except ValueError:
            # Its message has parts of the URL, and they may be of the password.
            raise ValueError(
                "it is no URL of one server; write / # ? and @ in a password as %2F %23 %3F %40"
            ) from None
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError(
                "it has to begin with redis://, rediss:// or unix://; Sentinel and Cluster are "
                "not supported: give the address of one server, or of a proxy before them"
            )
        return url

    @field_validator("device", "batch_policy", "log_level", "log_format", mode="before")
    @classmethod
    def _ignore_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_queue(self) -> Self:
        if self.queue_max_rows < self.max_instances:
            raise ValueError(
                "QUEUE_MAX_ROWS has to be at least MAX_INSTANCES, or a full request never fits"
            )
        if self.queue_max_bytes < self.max_body_bytes:
            raise ValueError(
                "QUEUE_MAX_BYTES has to be at least MAX_BODY_BYTES, or a large request never fits"
            )
        return self

    @model_validator(mode="after")
    def _check_grace(self) -> Self:
        if self.request_timeout_s > self.shutdown_grace_s - SHUTDOWN_RESERVE_S:
            raise ValueError(
                "SHUTDOWN_GRACE_S has to exceed REQUEST_TIMEOUT_S by at least "
                f"{SHUTDOWN_RESERVE_S}, or a stop would cut off accepted requests"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        pyproject = PyprojectTomlConfigSettingsSource(settings_cls)
        return init_settings, env_settings, dotenv_settings, pyproject


def load_settings() -> Settings:
    """The settings of this process.

    Raises:
        StartupError: some are invalid; it names each, and no value, which may be a secret.
    """
    try:
        return Settings()
    except ValidationError as error:
        faults = (
            ": ".join([*(str(part).upper() for part in details["loc"][:1]), details["msg"]])
            for details in error.errors(include_url=False, include_input=False)
        )
        raise StartupError(f"Invalid settings: {'; '.join(faults)}") from None
