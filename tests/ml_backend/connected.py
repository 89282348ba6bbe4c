"""A Label Studio whose backends have a state, as the real one gives them."""

from __future__ import annotations

from tests.ml_backend.servers import Answer, FakeLabelStudio, Request, json_answer


class ConnectedLabelStudio(FakeLabelStudio):
    """Says of every backend what `state` says; 1.23.2's field names."""

    def __init__(self) -> None:
        super().__init__()
        self.state = {
            "state": "CO",
            "readable_state": "Connected",
            "error_message": None,
            "model_version": "sam-tiny-12345678",
        }

    def answer(self, request: Request) -> Answer:
        if request.path == "/api/version/":  # which it tells anybody
            return json_answer({"release": "1.23.2"})
        return super().answer(request)

    def _api(self, request: Request, path: str) -> Answer:
        number = path.strip("/").split("/")[2:]
        if path.startswith("/api/projects/") and number and int(number[0]) > len(self.projects):
            return json_answer({"detail": "Not found."}, 404)
        answer = super()._api(request, path)
        if path.startswith("/api/ml"):
            for backend in self.backends:
                backend |= self.state
            return super()._api(request, path) if request.method == "GET" else self._last(path)
        return answer

    def _last(self, path: str) -> Answer:
        number = path.strip("/").split("/")[2:]
        return json_answer(self.backends[int(number[0]) - 1 if number else -1])
