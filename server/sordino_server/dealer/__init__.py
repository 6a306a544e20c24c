"""The dealer: preprocessing for sessions on shares, by the server or by a process of its own.

desk.py      one session: what is dealt to whom, how far ahead
pace.py      when the next step is dealt
backend_*.py how its products of masks are computed
"""
