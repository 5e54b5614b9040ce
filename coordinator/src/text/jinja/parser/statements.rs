//! Statements.

use super::super::names;
use super::super::syntax::{Expr, For, Macro, Specials, Statement, Symbol, Target};
use super::{Asked, Body, Kind, MAX_PARAMETERS, Parsed, Parser};

impl Parser {
    /// Statements up to a tag that is one of `ends`, whose name is the next token then; up to the
    /// template's end if there are none.
    pub(super) fn body(&mut self, ends: &[&str]) -> Parsed<Body> {
        self.deeper(|parser| parser.body_here(ends))
    }

    fn body_here(&mut self, ends: &[&str]) -> Parsed<Body> {
        let mut body = Vec::new();
        loop {
            match self.kind() {
                Kind::Data(text) => {
                    body.push(Statement::Text(text.clone()));
                    self.next();
                }
                Kind::PrintBegin => {
                    self.next();
                    let printed = self.tuple(false, true, &[])?;
                    body.push(Statement::Print(printed.expr));
                    if !matches!(self.kind(), Kind::PrintEnd) {
                        return Err(self.unexpected());
                    }
                    self.next();
                }
                Kind::BlockBegin => {
                    self.next();
                    if matches!(self.kind(), Kind::Name(name) if ends.contains(&&**name)) {
                        return Ok(body);
                    }
                    self.statement(&mut body)?;
                    self.block_end()?;
                }
                Kind::End if ends.is_empty() => return Ok(body),
                Kind::End => {
                    let ends = ends.join(" or ");
                    return Err(self.error(format!("unexpected end, expected {ends}")));
                }
                _ => return Err(self.unexpected()),
            }
        }
    }

    fn block_end(&mut self) -> Parsed<()> {
        if !matches!(self.kind(), Kind::BlockEnd) {
            return Err(self.unexpected());
        }
        self.next();
        Ok(())
    }

    /// The body after an opening tag, whose end is still to be read.
    fn inner(&mut self, ends: &[&str]) -> Parsed<Body> {
        self.skip_sign(":");
        self.block_end()?;
        self.body(ends)
    }

    /// The body after an opening tag up to the tag `end`, whose name is read too.
    fn inner_to(&mut self, end: &str) -> Parsed<Body> {
        let body = self.inner(&[end])?;
        self.next();
        Ok(body)
    }

    /// A body from which the loops around it cannot be left: its text would be lost.
    fn captured_to(&mut self, end: &str) -> Parsed<Body> {
        let loops = std::mem::take(&mut self.loop_depth);
        let body = self.inner_to(end)?;
        self.loop_depth = loops;
        Ok(body)
    }

    fn statement(&mut self, out: &mut Body) -> Parsed<()> {
        let tag = self.expect_name()?;
        let statement = match &*tag {
            "for" => self.for_loop()?,
            "if" => self.if_block()?,
            "set" => self.set()?,
            "macro" => self.macro_block()?,
            "call" => self.call_block()?,
            "with" => self.with()?,
            "filter" => {
                let filter = self.block_filter()?;
                let body = self.captured_to("endfilter")?;
                Statement::FilterBlock { filter, body }
            }
            "generation" => Statement::Scope(self.captured_to("endgeneration")?),
            "break" | "continue" if self.loop_depth == 0 => {
                return Err(self.error(format!("{tag:?} outside of a loop")));
            }
            "break" => Statement::Break,
            "continue" => Statement::Continue,
            "print" => {
                let mut first = true;
                while !matches!(self.kind(), Kind::BlockEnd) {
                    if !first {
                        self.expect_sign(",")?;
                    }
                    first = false;
                    out.push(Statement::Print(self.expression()?.expr));
                }
                return Ok(());
            }
            _ if names::UNSUPPORTED_TAGS.contains(&&*tag) => {
                return Err(self.unsupported(format!("the tag {tag:?}")));
            }
            _ => {
                let tag: String = tag.chars().take(64).collect();
                return Err(self.error(format!("unknown tag {tag:?}")));
            }
        };
        out.push(statement);
        Ok(())
    }

    /// The names that are given a value: one, or several with commas between them.
    fn target(&mut self, attributes: bool, ends: &[&str]) -> Parsed<Target> {
        self.deeper(|parser| parser.target_here(attributes, ends))
    }

    fn target_here(&mut self, attributes: bool, ends: &[&str]) -> Parsed<Target> {
        let mut targets = Vec::new();
        loop {
            let ends_here = self.ends_tuple(ends) || self.is_sign("=");
            if !targets.is_empty() && ends_here {
                break;
            }
            let target = if self.skip_sign("(") {
                let inner = self.target(attributes, &[])?;
                self.expect_sign(")")?;
                inner
            } else {
                self.target_name(attributes)?
            };
            if !self.is_sign(",") && targets.is_empty() {
                return Ok(target);
            }
            targets.push(target);
            if !self.skip_sign(",") {
                break;
            }
        }
        Ok(Target::Tuple(targets))
    }

    fn target_name(&mut self, attributes: bool) -> Parsed<Target> {
        let name = self.expect_name()?;
        if matches!(&*name, "true" | "false" | "none" | "True" | "False" | "None") {
            return Err(self.error(format!("can't assign to {name:?}")));
        }
        if attributes && self.skip_sign(".") {
            let attribute = self.expect_name()?;
            // It is asked for, to be changed.
            return Ok(Target::Attribute(self.load(&name)?, attribute));
        }
        Ok(Target::Name(self.store(&name)))
    }

    fn for_loop(&mut self) -> Parsed<Statement> {
        let target = self.target(false, &["in"])?;
        if !self.skip_name("in") {
            return Err(self.unexpected());
        }
        let items = self.tuple(false, false, &["recursive"])?.expr;
        let test = if self.skip_name("if") { Some(self.expression()?.expr) } else { None };
        let recursive = self.skip_name("recursive");
        self.loop_depth += 1;
        let body = self.inner(&["endfor", "else"])?;
        self.loop_depth -= 1;
        let otherwise = if self.skip_name("else") { self.inner(&["endfor"])? } else { Vec::new() };
        self.next();
        self.loops.push(For { target, items, test, recursive, body, otherwise });
        Ok(Statement::For(self.loops.len() - 1))
    }

    fn if_block(&mut self) -> Parsed<Statement> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, false, &[])?.expr;
            let body = self.inner(&["elif", "else", "endif"])?;
            branches.push((test, body));
            if self.skip_name("elif") {
                continue;
            }
            let otherwise =
                if self.skip_name("else") { self.inner(&["endif"])? } else { Vec::new() };
            self.next();
            return Ok(Statement::If { branches, otherwise });
        }
    }

    fn set(&mut self) -> Parsed<Statement> {
        let target = self.target(true, &[])?;
        if self.skip_sign("=") {
            let value = self.tuple(false, true, &[])?;
            return Ok(Statement::Set(target, value.expr));
        }
        let filter = if self.is_sign("|") { Some(self.block_filter()?) } else { None };
        let body = self.captured_to("endset")?;
        Ok(Statement::SetBlock { target, filter, body })
    }

    /// The filters that a block's text passes through.
    fn block_filter(&mut self) -> Parsed<Expr> {
        let mut node = self.filter(None)?;
        while self.is_sign("|") {
            node = self.filter(Some(node))?;
        }
        Ok(node.expr)
    }

    fn with(&mut self) -> Parsed<Statement> {
        let mut variables: Vec<(Target, Expr)> = Vec::new();
        while !matches!(self.kind(), Kind::BlockEnd | Kind::Sign(":")) {
            if !variables.is_empty() {
                self.expect_sign(",")?;
            }
            // A comma begins the next variable, so a tuple needs its parentheses.
            let target = if self.skip_sign("(") {
                let target = self.target(false, &[])?;
                self.expect_sign(")")?;
                target
            } else {
                self.target_name(false)?
            };
            self.expect_sign("=")?;
            variables.push((target, self.expression()?.expr));
        }
        let body = self.inner_to("endwith")?;
        Ok(Statement::With { variables, body })
    }

    fn signature(&mut self) -> Parsed<Vec<(Symbol, Option<Expr>)>> {
        self.expect_sign("(")?;
        let mut parameters: Vec<(Symbol, Option<Expr>)> = Vec::new();
        while !self.is_sign(")") {
            if !parameters.is_empty() {
                self.expect_sign(",")?;
            }
            let name = self.expect_name()?;
            if parameters.len() == MAX_PARAMETERS {
                return Err(self.error(format!("more than {MAX_PARAMETERS} parameters")));
            }
            let symbol = self.symbol(&name);
            if parameters.iter().any(|(other, _)| *other == symbol) {
                return Err(self.error(format!("duplicate argument {name:?}")));
            }
            let default = if self.skip_sign("=") {
                Some(self.expression()?.expr)
            } else if parameters.iter().any(|(_, default)| default.is_some()) {
                return Err(self.error("non-default argument follows default argument"));
            } else {
                None
            };
            parameters.push((symbol, default));
        }
        self.expect_sign(")")?;
        Ok(parameters)
    }

    /// The rest of a macro, whose parameters are read.
    fn macro_body(
        &mut self,
        name: String,
        parameters: Vec<(Symbol, Option<Expr>)>,
        end: &str,
    ) -> Parsed<usize> {
        let own = |special: &str| {
            let symbol = self.symbols.get(special);
            parameters.iter().position(|(symbol_, _)| Some(symbol_) == symbol)
        };
        let (caller, kwargs, varargs) = (own("caller"), own("kwargs"), own("varargs"));
        self.asked.push(Asked::default());
        let body = self.captured_to(end)?;
        let found = self.asked.pop().map(|asked| asked.found).unwrap_or_default();
        if found.caller && caller.is_some_and(|at| parameters[at].1.is_none()) {
            return Err(self.error("the special \"caller\" argument must have a default"));
        }
        let takes = Specials {
            caller: found.caller && caller.is_none(),
            kwargs: found.kwargs && kwargs.is_none(),
            varargs: found.varargs && varargs.is_none(),
        };
        self.macros.push(Macro { name, parameters, takes, body });
        Ok(self.macros.len() - 1)
    }

    fn macro_block(&mut self) -> Parsed<Statement> {
        let name = self.expect_name()?;
        let symbol = self.store(&name);
        let parameters = self.signature()?;
        let index = self.macro_body(name.into(), parameters, "endmacro")?;
        Ok(Statement::Macro(index, symbol))
    }

    fn call_block(&mut self) -> Parsed<Statement> {
        let parameters = if self.is_sign("(") { self.signature()? } else { Vec::new() };
        let Expr::Call(callee, arguments) = self.expression()?.expr else {
            return Err(self.error("expected call"));
        };
        if arguments.keyword.iter().any(|(name, _)| &**name == "caller") {
            return Err(self.error("a call block's call cannot have a caller of its own"));
        }
        let caller = self.macro_body(String::new(), parameters, "endcall")?;
        Ok(Statement::CallBlock { callee: *callee, arguments: *arguments, caller })
    }
}
