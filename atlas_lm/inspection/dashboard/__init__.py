"""Reports and training runs in a browser: app.py has the Streamlit calls, the other files the tables that it draws."""
