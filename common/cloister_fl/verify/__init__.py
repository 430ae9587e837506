"""Checks of certificates and ledger exports, offline, by somebody who was not there."""
