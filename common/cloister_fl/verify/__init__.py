"""Offline checks of certificates and ledger exports by a third party."""
