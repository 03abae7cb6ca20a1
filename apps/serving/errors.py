"""Says what is wrong with a request as OpenAI's clients expect it."""

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A refusal, sent as OpenAI's clients expect one."""

    def __init__(self, status: int, message: str, *, code=None, param=None, headers=None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict:
        """Returns what is sent: an object with the `error`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": str(self),
            "type": KINDS.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}
