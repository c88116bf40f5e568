"""The API as generated code: stubs and messages. Written by protos/generate.sh, never by hand."""
