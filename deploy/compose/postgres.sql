-- A database with something in it. Its owner is Mayfly's admin here: able to make roles, and no
-- superuser. up.sh gives it its password.
CREATE ROLE mayfly_admin LOGIN CREATEROLE;
CREATE DATABASE shop OWNER mayfly_admin;
\connect shop
SET ROLE mayfly_admin;
CREATE TABLE invoices (number integer PRIMARY KEY, customer text NOT NULL, amount numeric NOT NULL);
INSERT INTO invoices VALUES (1, 'Ada', 120.50), (2, 'Grace', 80.00), (3, 'Edsger', 310.25);
