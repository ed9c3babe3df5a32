"""Where S3 is, and who we are there: endpoint, region, credentials, signed requests, and what errors mean.

What AWS's own tools understand is understood here: the AWS_* variables, profiles with SSO or roles to assume,
instance roles. botocore does that; it is imported only where plain variables do not suffice, or to list.
"""

import datetime
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from urllib.parse import quote, urlencode

from raycnn.errors import ObjectChanged, ObjectMissing, StorageError, one_line
from raycnn.storage.base import without_userinfo

if TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

CONNECT_SECONDS = 3
"""To open a connection."""
FIRST_SECONDS = 3
"""For the first answer of an endpoint, twice; only one that has answered once is waited for patiently."""
STALL_SECONDS = 60
"""Without a byte, within one request."""
RETRIES = 8
"""Repetitions of a request that failed by no fault of ours, over about a minute: a server may be started again."""
RETRY_SECONDS = 120
"""After which nothing is repeated."""

_EXPIRES = datetime.timedelta(minutes=5)
_BACKOFF = {
    "init_backoff": datetime.timedelta(milliseconds=100),
    "max_backoff": datetime.timedelta(seconds=15),
    "base": 8,  # obstore waits from 0.1 s to the last wait times this: with 2 it hardly grows, and all ends within 2 s
}


class Keys(NamedTuple):
    """What signs a request."""

    access_key: str
    secret_key: str
    token: str | None


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Account:
    """One endpoint with one identity. Get it from `find_account`."""

    _process: ClassVar[int | None] = None
    """The process in which obstore's threads run: a forked child has none, and would wait for them for ever."""

    def __init__(
        self,
        endpoint: str | None,
        region: str,
        keys: Callable[[], Keys] | None,
        *,
        requester_pays: bool = False,
        authorities: str | None = None,
    ) -> None:
        """Describe where and who.

        Args:
            endpoint: e.g. `http://127.0.0.1:8333`; None for AWS itself. Buckets are addressed by path.
            region: the region that signatures name.
            keys: gives the current credentials; None to ask anonymously.
            requester_pays: agree to pay for requests to buckets that ask for it.
            authorities: a file with the certificates to trust, instead of the system's.
        """
        self.custom = endpoint is not None
        suffix = ".com.cn" if region.startswith("cn-") else ".com"
        self.endpoint = endpoint.rstrip("/") if endpoint else f"https://s3.{region}.amazonaws{suffix}"
        if not self.endpoint.startswith(("http://", "https://")):
            shown = without_userinfo(self.endpoint)
            raise StorageError(f"AWS_ENDPOINT_URL is {shown!r}; it must begin with http:// or https://")
        self.region = region
        self.requester_pays = requester_pays
        self.keys = keys
        self.authorities = authorities
        self._reached = False
        self._clients: dict[tuple[str, int], S3Store] = {}
        self._sessions: dict[int, Any] = {}

    def client(self, bucket: str, *, repeats: bool = True) -> "S3Store":
        """The bucket's client; the endpoint has been seen to answer.

        Args:
            bucket: its name.
            repeats: whether the client itself repeats what fails.

        Raises:
            StorageError: nobody answers at the endpoint, found out within seconds.
        """
        process = Account._process = Account._process or os.getpid()
        if process != os.getpid():
            raise StorageError(
                "S3 was in use when this process was forked, which the S3 client does not survive: start processes "
                "with multiprocessing's spawn method"
            )
        kind = bucket, RETRIES if repeats else 0
        if kind not in self._clients:
            if not self._reached:
                self._reach(bucket)
            self._clients[kind] = self._connect(*kind, total_seconds=600)
        return self._clients[kind]

    def _reach(self, bucket: str) -> None:
        import obstore
        from obstore.exceptions import BaseError

        try:
            obstore.head(self._connect(bucket, 1, total_seconds=FIRST_SECONDS), "raycnn")
        except FileNotFoundError:
            pass
        except BaseError as error:
            if Failure.of(error).status is None:
                raise self.problem(error, f"s3://{bucket}") from None
        self._reached = True

    def _connect(self, bucket: str, retries: int, total_seconds: float) -> "S3Store":
        from obstore.store import S3Store

        options = {
            "allow_http": self.endpoint.startswith("http://"),
            "connect_timeout": f"{CONNECT_SECONDS} seconds",
            "read_timeout": f"{min(STALL_SECONDS, total_seconds)} seconds",
            "timeout": f"{total_seconds} seconds",
        }
        if self.authorities and self.endpoint.startswith("https://"):
            with open(self.authorities, encoding="ascii", errors="replace") as file:
                options["root_certificate"] = file.read()
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            region=self.region,
            virtual_hosted_style_request=False,
            skip_signature=self.keys is None,
            request_payer=self.requester_pays,
            client_options=options,  # pyright: ignore[reportArgumentType]
            retry_config={
                "max_retries": retries,
                "retry_timeout": datetime.timedelta(seconds=RETRY_SECONDS),
                "backoff": _BACKOFF,  # pyright: ignore[reportArgumentType]
            },
            # Also for keys that never change: obstore would mix in what else it finds in the environment.
            credential_provider=self._provide if self.keys else None,
        )

    def _provide(self) -> "S3Credential":
        assert self.keys is not None
        keys = self.keys()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + _EXPIRES,
        }

    def request(
        self, method: str, bucket: str, key: str = "", query: Sequence[tuple[str, str]] = (), body: bytes = b""
    ) -> Answer:
        """One signed request, for what obstore has no call for; repeated while the server fails.

        Raises:
            StorageError: there is no answer.
        """
        from botocore.exceptions import BotoCoreError, ConnectionError, HTTPClientError

        delays = pauses() if self._reached else iter([0.1])
        while True:
            try:
                answer = self._send(method, bucket, key, query, body)
            except (HTTPClientError, ConnectionError) as error:
                if (delay := next(delays, None)) is None:
                    raise self._unreachable(_cause(one_line(error.kwargs.get("error") or error))) from None
            except BotoCoreError as error:
                raise StorageError(f"AWS credentials: {one_line(error)}; log in again") from None
            else:
                if not self._reached:  # it answers, if only that it is busy, so patience is in place
                    self._reached, delays = True, pauses()
                busy = answer.status >= 500 or answer.status == 429
                if not busy or (delay := next(delays, None)) is None:
                    return answer
            time.sleep(delay)

    def _send(self, method: str, bucket: str, key: str, query: Sequence[tuple[str, str]], body: bytes) -> Answer:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        patience = STALL_SECONDS if self._reached else FIRST_SECONDS
        if patience not in self._sessions:
            self._sessions[patience] = URLLib3Session(
                verify=self.authorities or True,  # pyright: ignore[reportArgumentType]
                proxies=get_environ_proxies(self.endpoint),
                timeout=(CONNECT_SECONDS, patience),  # pyright: ignore[reportArgumentType]
                max_pool_connections=32,
            )
        url = f"{self.endpoint}/{bucket}" + ("/" + quote(key, safe="/-_.~") if key else "")
        if query:
            url += "?" + urlencode(query, quote_via=quote, safe="-_.~")
        request = AWSRequest(method, url, data=body)
        if self.requester_pays:
            request.headers["x-amz-request-payer"] = "requester"
        if self.keys:
            S3SigV4Auth(self.keys(), "s3", self.region).add_auth(request)
        answer = self._sessions[patience].send(request.prepare())
        return Answer(answer.status_code, answer.headers, answer.content)

    def problem(self, error: Exception, address: str) -> StorageError:
        """What obstore raised, as one line; `address` is the object or the prefix it was about."""
        failure = Failure.of(error)
        if failure.status is None and "credential provider" in failure.text:
            return StorageError(f"the AWS credentials cannot be renewed ({failure.text}); log in again")
        if failure.status is None and failure.kind:
            return self._unreachable(failure.reason or failure.kind.lower())
        return self.refusal(failure.status or 0, failure.code, address, failure.text)

    def refusal(self, status: int, code: str, address: str, text: str = "", region: str = "") -> StorageError:
        """What an HTTP status and the error code in its body mean, and what to do.

        Args:
            status: 0 where there is none.
            code: such as NoSuchBucket, or ''.
            address: the object or prefix that was asked for.
            text: what else was said.
            region: where the bucket is, if the answer says so.
        """
        bucket = "/".join(address.split("/")[:3])
        said = f"HTTP {status} {code}".strip() if status else text
        if (status, code) == (400, ""):  # to HEAD, whose answers have no body, S3 says so that a token has expired
            return StorageError(
                f"{address}: the store refuses ({said}); have the AWS credentials expired? Log in again, or check "
                "the URL and AWS_ENDPOINT_URL"
            )
        if code == "NoSuchBucket":
            return StorageError(f"no such bucket: {bucket}; create it, or check its name and AWS_ENDPOINT_URL")
        if status == 404:
            return ObjectMissing(f"{address}: does not exist; check the path (upper and lower case differ)")
        if status == 412:
            return ObjectChanged(f"{address}: was replaced since it was listed")
        if code in {"ExpiredToken", "TokenRefreshRequired", "InvalidToken"}:
            return StorageError(f"{address}: the AWS credentials have expired ({said}); log in again")
        if code == "RequestTimeTooSkewed":
            return StorageError(f"{address}: this machine's clock is wrong ({said}); set it")
        if code in {"InvalidAccessKeyId", "SignatureDoesNotMatch"} or status == 401:
            return StorageError(
                f"{address}: the store refuses the credentials ({said}); check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        if status == 403:
            return StorageError(
                f"access denied to {address} ({said}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, and what they may do; for a public bucket append ?anonymous to its URL"
            )
        if status >= 500 or status == 429:
            return StorageError(f"{address}: the store keeps failing ({said}); run the same command again later")
        is_elsewhere = code in {"AuthorizationHeaderMalformed", "PermanentRedirect"} or 300 <= status < 400
        if is_elsewhere or "incorrectly configured region" in text:  # obstore's word for a redirect
            where = region or "its region"
            return StorageError(f"{address}: {bucket} is not in {self.region} ({said}); set AWS_REGION to {where}")
        return StorageError(f"{address}: the store refuses ({said}); check the URL and AWS_ENDPOINT_URL")

    def _unreachable(self, reason: str) -> StorageError:
        remedy = (
            "is the server running, and AWS_ENDPOINT_URL right?"
            if self.custom
            else "is this machine online? Set AWS_ENDPOINT_URL for a store that is not AWS"
        )
        return StorageError(f"cannot reach {without_userinfo(self.endpoint)} ({reason}): {remedy}")


class Failure(NamedTuple):
    """What can be learned from obstore's exceptions, which tell it in prose only."""

    status: int | None
    """HTTP status; None without an answer."""
    code: str
    """S3's error code, e.g. NoSuchBucket; '' where the answer has no body."""
    kind: str
    """Without an answer, how that came: Connect, Timeout, Interrupted, ..."""
    reason: str
    """Without an answer, the operating system's words."""
    text: str
    """The message's first sentence."""

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        return bool(self.kind) if self.status is None else self.status == 429 or self.status >= 500

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """What an exception of obstore's says."""
        text = without_userinfo(str(error))
        status = re.search(r"\bstatus: (\d{3})\b", text) or re.search(r"status code: (\d{3})\b", text)
        code = re.search(r"<Code>(\w+)</Code>", text)
        kind = re.search(r"HttpError \{\s*kind: (\w+)", text)
        reason = re.findall(r'(?:message|error): "([^"]+)"', text)
        return cls(
            int(status[1]) if status else None,
            code[1] if code else "",
            kind[1] if kind else "",
            reason[-1] if reason else "",
            one_line(text.partition("\n")[0]),
        )


def _cause(text: str) -> str:
    """The operating system's words in what urllib3 says."""
    if words := re.search(r"Error\(\d+, ['\"]([^'\"]+)", text):
        return words[1]
    return text.rpartition("] ")[2].rpartition(": ")[2].strip(")")


def pauses() -> Iterator[float]:
    """Seconds to wait before each repetition: exponential, with jitter, within RETRY_SECONDS."""
    give_up = time.monotonic() + RETRY_SECONDS
    for n in range(RETRIES):
        if time.monotonic() > give_up:
            return
        yield min(15, 0.1 * 3**n) * random.uniform(0.5, 1)


def find_account(*, anonymous: bool = False, requester_pays: bool = False) -> Account:
    """The account that the environment describes.

    Raises:
        StorageError: there are no credentials, or they cannot be had.
    """
    settings = ("HOME", "USERPROFILE")
    environment = tuple((k, v) for k, v in sorted(os.environ.items()) if k.startswith("AWS_") or k in settings)
    return _find_account(environment, anonymous, requester_pays)


@lru_cache(maxsize=8)
def _find_account(environment: tuple[tuple[str, str], ...], anonymous: bool, requester_pays: bool) -> Account:
    settings = dict(environment)
    endpoint = settings.get("AWS_ENDPOINT_URL_S3") or settings.get("AWS_ENDPOINT_URL")
    region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    authorities = settings.get("AWS_CA_BUNDLE")
    keys: Callable[[], Keys] | None = None
    secrets = [settings.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    if not anonymous and all(secrets):
        static = Keys(secrets[0] or "", secrets[1] or "", settings.get("AWS_SESSION_TOKEN") or None)
        keys = lambda: static  # noqa: E731
    file = os.path.expanduser(settings.get("AWS_CONFIG_FILE") or "~/.aws/config")
    plain = (endpoint and region) or not os.path.exists(file)
    if not (plain and (keys or anonymous)) or "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS" in settings:
        endpoint, region, authorities, keys = _ask_botocore(region, anonymous)
    return Account(
        endpoint,
        region or "us-east-1",
        keys,
        requester_pays=requester_pays,
        authorities=authorities or None,
    )


def _ask_botocore(
    region: str | None, anonymous: bool
) -> tuple[str | None, str | None, str | None, Callable[[], Keys] | None]:
    """Endpoint, region, certificates and credentials as botocore finds them; endpoint None for AWS itself."""
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from botocore.session import get_session

    try:
        session = get_session()
        region = region or session.get_config_variable("region") or "us-east-1"
        settings = Config(signature_version=UNSIGNED)
        found = session.create_client("s3", region_name=region, config=settings).meta.endpoint_url
        usual = {f"https://s3.{region}.amazonaws.com", "https://s3.amazonaws.com"}
        custom = None if found.removesuffix(".cn") in usual else found
        authorities = session.get_config_variable("ca_bundle")
        if anonymous:
            return custom, region, authorities, None
        credentials = session.get_credentials()
        if credentials is None:
            raise StorageError(
                "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
                "for a public bucket append ?anonymous to its URL"
            )
        credentials.get_frozen_credentials()
        return custom, region, authorities, lambda: Keys(*credentials.get_frozen_credentials()[:3])
    except BotoCoreError as error:
        raise StorageError(f"AWS credentials: {one_line(error)}; check AWS_PROFILE, or log in again") from None
