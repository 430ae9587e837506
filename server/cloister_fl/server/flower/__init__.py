"""Flower embedded: the SuperLink, and engines that run both apps in one process or on Ray."""
