-- An example database. Its owner is Mayfly's admin: it may make roles, but is not a superuser. up.sh sets its password.
CREATE ROLE mayfly_admin LOGIN CREATEROLE;
CREATE DATABASE shop OWNER mayfly_admin;
\connect shop
SET ROLE mayfly_admin;
CREATE TABLE invoices (number integer PRIMARY KEY, customer text NOT NULL, amount numeric NOT NULL);
INSERT INTO invoices VALUES (1, 'Ada', 120.50), (2, 'Grace', 80.00), (3, 'Edsger', 310.25);
