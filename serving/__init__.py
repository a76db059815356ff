"""The server: gRPC on ONNX Runtime, with the recurrent state of every caller held in a pool."""

import os

# ONNX Runtime 1.29 and later reports how it is used to its makers, also on Linux, and keeps an id of the
# machine in the home folder. It looks at this variable when it is loaded, so before any module below is.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
