"""Every kind of fault, injected into real runs; writes `docs/reliability.md`."""
