//! What stands between operators: names, literals, calls, subscripts, filters and tests.

use super::super::names;
use super::super::syntax::{Arguments, Expr, Symbol};
use super::{Asked, Kind, MAX_PARAMETERS, Node, Parsed, Parser, Token};

impl Parser {
    pub(super) fn primary(&mut self) -> Parsed<Node> {
        let expr = match self.kind() {
            Kind::Name(name) => {
                let name = name.clone();
                self.next();
                match &*name {
                    "true" | "True" => Expr::Bool(true),
                    "false" | "False" => Expr::Bool(false),
                    "none" | "None" => Expr::None,
                    _ => Expr::Name(self.load(&name)?),
                }
            }
            Kind::Text(text) => {
                let mut text = text.clone();
                self.next();
                while let Kind::Text(more) = self.kind() {
                    text.push_str(more);
                    self.next();
                }
                Expr::Text(text)
            }
            &Kind::Int(value) => {
                self.next();
                Expr::Int(value)
            }
            &Kind::Float(value) => {
                self.next();
                Expr::Float(value)
            }
            Kind::Sign("(") => {
                self.next();
                let node = self.tuple(true, true, &[])?;
                self.expect_sign(")")?;
                return Ok(node);
            }
            Kind::Sign("[") => return self.list(),
            Kind::Sign("{") => return self.dict(),
            _ => return Err(self.unexpected()),
        };
        self.node(0, expr)
    }

    /// A name whose value is asked for.
    pub(super) fn load(&mut self, name: &str) -> Parsed<Symbol> {
        if names::UNSUPPORTED_GLOBALS.contains(&name) && !self.symbols.contains_key(name) {
            return Err(self.unsupported(format!("the function {name:?}")));
        }
        for asked in &mut self.asked {
            let Asked { found, stored } = asked;
            match name {
                "caller" => found.caller |= !stored.caller,
                "kwargs" => found.kwargs |= !stored.kwargs,
                "varargs" => found.varargs |= !stored.varargs,
                _ => {}
            }
        }
        Ok(self.symbol(name))
    }

    /// A name that is given a value.
    pub(super) fn store(&mut self, name: &str) -> Symbol {
        for Asked { stored, .. } in &mut self.asked {
            match name {
                "caller" => stored.caller = true,
                "kwargs" => stored.kwargs = true,
                "varargs" => stored.varargs = true,
                _ => {}
            }
        }
        self.symbol(name)
    }

    pub(super) fn ends_tuple(&self, ends: &[&str]) -> bool {
        match self.kind() {
            Kind::PrintEnd | Kind::BlockEnd | Kind::Sign(")") => true,
            Kind::Name(name) => ends.contains(&&**name),
            _ => false,
        }
    }

    /// One expression, or several with commas between them.
    pub(super) fn tuple(
        &mut self,
        parenthesised: bool,
        conditions: bool,
        ends: &[&str],
    ) -> Parsed<Node> {
        let mut items = Vec::new();
        let mut height = 0;
        let mut is_tuple = false;
        loop {
            if !items.is_empty() {
                self.expect_sign(",")?;
            }
            if self.ends_tuple(ends) {
                break;
            }
            let item = if conditions { self.expression()? } else { self.deeper(Self::or)? };
            if items.is_empty() && !self.is_sign(",") {
                return Ok(item);
            }
            height = height.max(item.height);
            items.push(item.expr);
            if !self.is_sign(",") {
                break;
            }
            is_tuple = true;
        }
        if !is_tuple && !parenthesised {
            return Err(self.unexpected());
        }
        self.node(height, Expr::Tuple(items))
    }

    fn list(&mut self) -> Parsed<Node> {
        self.next();
        let mut items = Vec::new();
        let mut height = 0;
        while !self.is_sign("]") {
            if !items.is_empty() {
                self.expect_sign(",")?;
                if self.is_sign("]") {
                    break;
                }
            }
            let item = self.expression()?;
            height = height.max(item.height);
            items.push(item.expr);
        }
        self.expect_sign("]")?;
        self.node(height, Expr::List(items))
    }

    fn dict(&mut self) -> Parsed<Node> {
        self.next();
        let mut entries = Vec::new();
        let mut height = 0;
        while !self.is_sign("}") {
            if !entries.is_empty() {
                self.expect_sign(",")?;
                if self.is_sign("}") {
                    break;
                }
            }
            let key = self.expression()?;
            self.expect_sign(":")?;
            let value = self.expression()?;
            height = height.max(key.height).max(value.height);
            entries.push((key.expr, value.expr));
        }
        self.expect_sign("}")?;
        self.node(height, Expr::Dict(entries))
    }

    pub(super) fn postfix(&mut self, mut node: Node) -> Parsed<Node> {
        loop {
            node = match self.kind() {
                Kind::Sign(".") => self.dot(node)?,
                Kind::Sign("[") => self.subscript(node)?,
                Kind::Sign("(") => self.call(node)?,
                _ => return Ok(node),
            };
        }
    }

    pub(super) fn filters_and_tests(&mut self, mut node: Node) -> Parsed<Node> {
        loop {
            node = match self.kind() {
                Kind::Sign("|") => self.filter(Some(node))?,
                Kind::Name(name) if &**name == "is" => self.test(node)?,
                Kind::Sign("(") => self.call(node)?,
                _ => return Ok(node),
            };
        }
    }

    fn dot(&mut self, value: Node) -> Parsed<Node> {
        self.next();
        match self.kind() {
            Kind::Name(name) => {
                let name = name.clone();
                self.next();
                self.node(value.height, Expr::Attribute(value.expr.into(), name))
            }
            &Kind::Int(index) => {
                self.next();
                let expr = Expr::Item(value.expr.into(), Expr::Int(index).into());
                self.node(value.height, expr)
            }
            _ => Err(self.error("expected name or number")),
        }
    }

    fn subscript(&mut self, value: Node) -> Parsed<Node> {
        self.next();
        if self.is_sign("]") {
            // Python: an empty tuple as the key.
            self.next();
            let expr = Expr::Item(value.expr.into(), Expr::Tuple(Vec::new()).into());
            return self.node(value.height, expr);
        }
        let first = if self.is_sign(":") { None } else { Some(self.expression()?) };
        if self.is_sign(":") {
            let mut height = value.height.max(first.as_ref().map_or(0, |first| first.height));
            let mut bounds = [first.map(|first| first.expr), None, None];
            for bound in &mut bounds[1..] {
                if !self.skip_sign(":") {
                    break;
                }
                if !(self.is_sign(":") || self.is_sign("]") || self.is_sign(",")) {
                    let parsed = self.expression()?;
                    height = height.max(parsed.height);
                    *bound = Some(parsed.expr);
                }
            }
            if self.is_sign(",") {
                return Err(self.unsupported("a slice among other subscripts"));
            }
            self.expect_sign("]")?;
            return self.node(height, Expr::Slice(value.expr.into(), bounds.into()));
        }
        let Some(first) = first else { return Err(self.unexpected()) };
        let mut height = value.height.max(first.height);
        let mut keys = vec![first.expr];
        while self.skip_sign(",") {
            let key = self.expression()?;
            if self.is_sign(":") {
                return Err(self.unsupported("a slice among other subscripts"));
            }
            height = height.max(key.height);
            keys.push(key.expr);
        }
        self.expect_sign("]")?;
        let key = match keys.pop() {
            Some(only) if keys.is_empty() => only,
            last => {
                keys.extend(last);
                height += 1;
                Expr::Tuple(keys)
            }
        };
        self.node(height, Expr::Item(value.expr.into(), key.into()))
    }

    fn call(&mut self, callee: Node) -> Parsed<Node> {
        if let Expr::Attribute(_, name) = &callee.expr
            && names::UNSUPPORTED_METHODS.contains(&&**name)
        {
            return Err(self.unsupported(format!("the method {name:?}")));
        }
        let (arguments, height) = self.arguments()?;
        let expr = Expr::Call(callee.expr.into(), arguments.into());
        self.node(callee.height.max(height), expr)
    }

    /// What stands in parentheses, and its height.
    fn arguments(&mut self) -> Parsed<(Arguments, usize)> {
        self.expect_sign("(")?;
        let mut out = Arguments::default();
        let mut height = 0;
        let mut any = false;
        while !self.is_sign(")") {
            if any {
                self.expect_sign(",")?;
                if self.is_sign(")") {
                    break;
                }
            }
            any = true;
            let ok = if self.skip_sign("*") {
                let more = self.expression()?;
                height = height.max(more.height);
                out.more_keyword.is_none() && out.more.replace(more.expr).is_none()
            } else if self.skip_sign("**") {
                let more = self.expression()?;
                height = height.max(more.height);
                out.more_keyword.replace(more.expr).is_none()
            } else if let (Kind::Name(name), Some(Token { kind: Kind::Sign("="), .. })) =
                (self.kind(), self.tokens.get(self.at + 1))
            {
                let name = name.clone();
                self.next();
                self.next();
                let value = self.expression()?;
                height = height.max(value.height);
                if out.keyword.len() == MAX_PARAMETERS {
                    return Err(self.error(format!("more than {MAX_PARAMETERS} named arguments")));
                }
                let twice = out.keyword.iter().any(|(other, _)| *other == name);
                out.keyword.push((name, value.expr));
                out.more_keyword.is_none() && !twice
            } else {
                let value = self.expression()?;
                height = height.max(value.height);
                out.positional.push(value.expr);
                out.more.is_none() && out.more_keyword.is_none() && out.keyword.is_empty()
            };
            if !ok {
                return Err(self.error("invalid syntax for function call expression"));
            }
        }
        self.expect_sign(")")?;
        Ok((out, height))
    }

    /// A filter's or test's name.
    fn dotted_name(&mut self) -> Parsed<String> {
        let mut name = self.expect_name()?.into_string();
        while self.skip_sign(".") {
            name.push('.');
            name.push_str(&self.expect_name()?);
        }
        Ok(name)
    }

    /// `| name(…)`, or without the `|` in a block's opening.
    pub(super) fn filter(&mut self, value: Option<Node>) -> Parsed<Node> {
        self.skip_sign("|");
        let name = self.dotted_name()?;
        if !names::FILTERS.contains(&&*name) {
            let name: String = name.chars().take(64).collect();
            return Err(self.unsupported(format!("the filter {name:?}")));
        }
        let (arguments, height) =
            if self.is_sign("(") { self.arguments()? } else { Default::default() };
        self.check_named(&name, &arguments)?;
        let height = height.max(value.as_ref().map_or(0, |value| value.height));
        let value = value.map(|value| value.expr.into());
        self.node(height, Expr::Filter(value, name.into(), arguments.into()))
    }

    /// Filters and tests that a filter is given by name.
    fn check_named(&self, filter: &str, arguments: &Arguments) -> Parsed<()> {
        let place = match filter {
            "map" | "select" | "reject" => 0,
            "selectattr" | "rejectattr" => 1,
            _ => return Ok(()),
        };
        let Some(Expr::Text(name)) = arguments.positional.get(place) else { return Ok(()) };
        let (kind, known) = match filter {
            "map" => ("filter", names::FILTERS.contains(&&**name)),
            _ => ("test", names::TESTS.contains(&&**name)),
        };
        if known {
            return Ok(());
        }
        let name: String = name.chars().take(64).collect();
        Err(self.unsupported(format!("the {kind} {name:?}")))
    }

    fn test(&mut self, value: Node) -> Parsed<Node> {
        self.next();
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        if !names::TESTS.contains(&&*name) {
            let name: String = name.chars().take(64).collect();
            return Err(self.unsupported(format!("the test {name:?}")));
        }
        let takes_one = match self.kind() {
            Kind::Name(name) => !matches!(&**name, "else" | "or" | "and"),
            Kind::Text(_) | Kind::Int(_) | Kind::Float(_) | Kind::Sign("[" | "{") => true,
            _ => false,
        };
        let (arguments, height) = if self.is_sign("(") {
            self.arguments()?
        } else if takes_one {
            if self.is_name("is") {
                return Err(self.error("you cannot chain multiple tests with is"));
            }
            let argument = self.primary()?;
            let argument = self.postfix(argument)?;
            let arguments = Arguments { positional: vec![argument.expr], ..Arguments::default() };
            (arguments, argument.height)
        } else {
            Default::default()
        };
        let height = height.max(value.height);
        let node =
            self.node(height, Expr::Test(value.expr.into(), name.into(), arguments.into()))?;
        if !negated {
            return Ok(node);
        }
        self.node(node.height, Expr::Not(node.expr.into()))
    }
}
