"""The service on the wire. The only folder of the server that speaks protobuf and gRPC; it decides nothing."""
