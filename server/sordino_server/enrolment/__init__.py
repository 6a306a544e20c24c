"""How devices come into the fleet: authority, tokens, requests, approval, and what the broker is told of all that.

ca             the fleet's own certificate authority, and that of tokens
broker_config  a mosquitto that lets in nobody else
"""
