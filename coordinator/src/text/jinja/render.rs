//! Runs a program's statements.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::json::{self, Json};
use super::meter::{Held, Meter, Writer};
use super::syntax::{Arguments, Expr, For, Statement, Symbol, Target};
use super::value::{self, Function, Items, Loop, Macro, Object, ScopeId, Value};
use super::{Failure, Program, operate, short, write};

/// Frames of statements, expressions and calls inside each other while rendering; Python stops at
/// 1000 of its own. A frame takes up to 2 KiB of stack, 6 KiB without optimisation.
const MAX_DEPTH: usize = 2000;

/// Variables of all scopes and attributes of all namespaces: templates have some fifty.
const MAX_VARIABLES: usize = 100_000;

/// Namespaces of one rendering: each is held until the end.
const MAX_NAMESPACES: usize = 10_000;

/// What a statement says of those after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

/// Names and values; `parent` is the scope around it.
#[derive(Debug)]
struct Scope {
    id: ScopeId,
    parent: Option<usize>,
    variables: Vec<(Symbol, Value)>,
}

/// One rendering.
pub(super) struct Renderer<'p> {
    pub(super) program: &'p Program,
    pub(super) meter: Rc<Meter>,
    pub(super) now_unix_s: u64,
    scopes: Vec<Scope>,
    /// The scope that names are looked up in first.
    current: usize,
    serial: u64,
    depth: usize,
    variables: usize,
    /// Values that may hold themselves, held until the end so that letting go of one never walks
    /// down a chain of them.
    held: Vec<Rc<Held<Object>>>,
}

/// Renders `program`.
pub(super) fn render(
    program: &Program,
    variables: &[(String, Json)],
    now_unix_s: u64,
    meter: &Rc<Meter>,
) -> Result<String, Failure> {
    let mut top = Vec::new();
    for (symbol, name) in program.names.iter().enumerate() {
        // Few are given; of equal names the last counts.
        if let Some((_, json)) = variables.iter().rev().find(|(other, _)| **other == **name) {
            top.push((symbol as Symbol, json::read(meter, json)?));
        }
        meter.spend(1 + variables.len() / 8)?;
    }
    let id = ScopeId { at: 0, serial: 0 };
    let mut renderer = Renderer {
        program,
        meter: Rc::clone(meter),
        now_unix_s,
        scopes: vec![Scope { id, parent: None, variables: top }],
        current: 0,
        serial: 0,
        depth: 0,
        variables: 0,
        held: Vec::new(),
    };
    let mut out = Writer::new(meter);
    let outcome = renderer.body(&program.body, &mut out);
    renderer.let_go();
    outcome?;
    Ok(out.finish())
}

impl<'p> Renderer<'p> {
    /// Empties what may hold itself.
    fn let_go(&mut self) {
        self.scopes.clear();
        for object in &self.held {
            let emptied: Vec<Value> = match &***object {
                Object::Namespace(attributes) => {
                    attributes.take().into_iter().map(|(_, value)| value).collect()
                }
                Object::Loop(state) => state.asked.take().unwrap_or_default(),
                _ => Vec::new(),
            };
            drop(emptied);
        }
        self.held.clear();
    }

    /// Runs `run` one frame deeper.
    pub(super) fn deeper<T>(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if self.depth == MAX_DEPTH {
            return Err(Failure::Limit(format!("calls went deeper than {MAX_DEPTH} frames")));
        }
        self.meter.spend(1)?;
        self.depth += 1;
        let outcome = run(self);
        self.depth -= 1;
        outcome
    }

    /// Pays for a variable or attribute more.
    fn count_variable(&mut self) -> Result<(), Failure> {
        if self.variables == MAX_VARIABLES {
            return Err(Failure::Limit(format!("it had more than {MAX_VARIABLES} variables")));
        }
        self.variables += 1;
        Ok(())
    }

    /// Holds a value that may hold itself until the end.
    pub(super) fn hold(&mut self, object: &Rc<Held<Object>>) -> Result<(), Failure> {
        if self.held.len() == MAX_NAMESPACES {
            return Err(Failure::Limit(format!("it made more than {MAX_NAMESPACES} namespaces")));
        }
        self.held.push(Rc::clone(object));
        Ok(())
    }

    /// A new namespace.
    pub(super) fn namespace(
        &mut self,
        attributes: Vec<(Rc<str>, Value)>,
    ) -> Result<Value, Failure> {
        for _ in &attributes {
            self.count_variable()?;
        }
        let object = Object::Namespace(RefCell::new(attributes));
        let value = Value::object(&self.meter, object)?;
        if let Value::Object(object) = &value {
            self.hold(object)?;
        }
        Ok(value)
    }

    /// The scope of this place, for what is made here and may be called later.
    pub(super) fn here(&self) -> ScopeId {
        self.scopes[self.current].id
    }

    /// Runs `run` in a new scope inside of `parent`.
    pub(super) fn scoped<T>(
        &mut self,
        parent: usize,
        run: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let outside = self.current;
        self.serial += 1;
        let at = self.scopes.len();
        let id = ScopeId { at, serial: self.serial };
        self.scopes.push(Scope { id, parent: Some(parent), variables: Vec::new() });
        self.current = at;
        let outcome = run(self);
        self.current = outside;
        let left = self.scopes.pop();
        self.variables -= left.map_or(0, |scope| scope.variables.len());
        outcome
    }

    /// Runs `run` in a new scope inside of the one named.
    ///
    /// # Errors
    ///
    /// If that scope is over: Python would have kept it.
    pub(super) fn scoped_in<T>(
        &mut self,
        scope: ScopeId,
        run: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if self.scopes.get(scope.at).is_none_or(|found| found.id != scope) {
            let message = "a macro or loop is called after the block that it was made in";
            return Err(Failure::new(message));
        }
        self.scoped(scope.at, run)
    }

    /// Gives a name of the innermost scope a value.
    pub(super) fn store(&mut self, name: Symbol, value: Value) -> Result<(), Failure> {
        let variables = &mut self.scopes[self.current].variables;
        self.meter.spend(variables.len() / 8)?;
        if let Some(found) = variables.iter_mut().find(|(other, _)| *other == name) {
            found.1 = value;
            return Ok(());
        }
        // Counted first: leaving the scope takes as many from the count as the scope has.
        self.count_variable()?;
        self.scopes[self.current].variables.push((name, value));
        Ok(())
    }

    /// The value of a name.
    pub(super) fn load(&mut self, name: Symbol) -> Result<Value, Failure> {
        let mut next = Some(self.current);
        while let Some(at) = next {
            let scope = &self.scopes[at];
            self.meter.spend(1 + scope.variables.len() / 8)?;
            if let Some((_, value)) = scope.variables.iter().find(|(other, _)| *other == name) {
                return Ok(value.clone());
            }
            next = scope.parent;
        }
        let name = &*self.program.names[name as usize];
        let function = match name {
            "range" => Function::Range,
            "dict" => Function::Dict,
            "namespace" => Function::Namespace,
            "cycler" => Function::Cycler,
            "joiner" => Function::Joiner,
            "raise_exception" => Function::RaiseException,
            "strftime_now" => Function::StrftimeNow,
            _ => return Ok(Value::undefined(format!("{:?} is undefined", short(name)))),
        };
        Value::object(&self.meter, Object::Function(function))
    }

    /// Runs statements one after another.
    pub(super) fn body(
        &mut self,
        body: &'p [Statement],
        out: &mut Writer,
    ) -> Result<Flow, Failure> {
        for statement in body {
            let flow = self.deeper(|renderer| renderer.statement(statement, out))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, statement: &'p Statement, out: &mut Writer) -> Result<Flow, Failure> {
        match statement {
            Statement::Text(text) => out.push_str(text)?,
            Statement::Print(expr) => {
                let value = self.eval(expr)?;
                write::str(out, &value)?;
            }
            Statement::If { branches, otherwise } => {
                for (test, body) in branches {
                    if self.eval(test)?.is_true() {
                        return self.body(body, out);
                    }
                }
                return self.body(otherwise, out);
            }
            Statement::For(index) => {
                let state = &self.program.loops[*index];
                let items = self.eval(&state.items)?;
                let recursive = state.recursive.then(|| (*index, self.here()));
                return self.repeat(state, &items, 0, recursive, out);
            }
            Statement::Set(target, expr) => {
                let value = self.eval(expr)?;
                self.assign(target, value)?;
            }
            Statement::SetBlock { target, filter, body } => {
                let value = self.captured(filter.as_ref(), body)?;
                self.assign(target, value)?;
            }
            Statement::FilterBlock { filter, body } => {
                let value = self.captured(Some(filter), body)?;
                write::str(out, &value)?;
            }
            Statement::With { variables, body } => return self.with(variables, body, out),
            Statement::Macro(index, name) => {
                let object = Object::Macro(Macro { index: *index, scope: self.here() });
                let value = Value::object(&self.meter, object)?;
                self.store(*name, value)?;
            }
            Statement::CallBlock { callee, arguments, caller } => {
                self.call_block(callee, arguments, *caller, out)?;
            }
            Statement::Scope(body) => {
                return self.scoped(self.current, |renderer| renderer.body(body, out));
            }
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    /// What a body writes, after its filter.
    fn captured(
        &mut self,
        filter: Option<&'p Expr>,
        body: &'p [Statement],
    ) -> Result<Value, Failure> {
        self.scoped(self.current, |renderer| {
            let mut text = Writer::new(&renderer.meter);
            // The parser allows nothing in it that leaves a loop around it.
            renderer.body(body, &mut text)?;
            let text = Value::text(&renderer.meter, text.finish())?;
            match filter {
                Some(filter) => renderer.eval_filters(filter, text),
                None => Ok(text),
            }
        })
    }

    fn with(
        &mut self,
        variables: &'p [(Target, Expr)],
        body: &'p [Statement],
        out: &mut Writer,
    ) -> Result<Flow, Failure> {
        // Each value is looked up outside.
        let outside = self.current;
        self.scoped(outside, |renderer| {
            let inside = renderer.current;
            for (target, expr) in variables {
                renderer.current = outside;
                let value = renderer.eval(expr);
                renderer.current = inside;
                renderer.assign(target, value?)?;
            }
            renderer.body(body, out)
        })
    }

    fn call_block(
        &mut self,
        callee: &'p Expr,
        arguments: &'p Arguments,
        caller: usize,
        out: &mut Writer,
    ) -> Result<(), Failure> {
        let object = Object::Macro(Macro { index: caller, scope: self.here() });
        let caller = Value::object(&self.meter, object)?;
        let value = self.eval_call(callee, arguments, Some(caller))?;
        write::str(out, &value)
    }

    /// Gives `target` a value.
    pub(super) fn assign(&mut self, target: &'p Target, value: Value) -> Result<(), Failure> {
        match target {
            Target::Name(name) => self.store(*name, value),
            Target::Tuple(targets) => {
                let items = operate::items(&self.meter, &value)?;
                if items.len() != targets.len() {
                    let (found, wanted) = (items.len(), targets.len());
                    let message = format!("{found} values cannot be given to {wanted} names");
                    return Err(Failure::new(message));
                }
                for (target, item) in targets.iter().zip(items.iter()) {
                    self.deeper(|renderer| renderer.assign(target, item.clone()))?;
                }
                Ok(())
            }
            Target::Attribute(name, attribute) => {
                let object = self.load(*name)?;
                if let Value::Object(object) = &object
                    && let Object::Namespace(attributes) = &***object
                {
                    return self.set_attribute(attributes, attribute, value);
                }
                Err(Failure::new("cannot assign attribute on non-namespace object"))
            }
        }
    }

    fn set_attribute(
        &mut self,
        attributes: &RefCell<Vec<(Rc<str>, Value)>>,
        name: &str,
        value: Value,
    ) -> Result<(), Failure> {
        let mut attributes = attributes.borrow_mut();
        self.meter.spend(attributes.len())?;
        if let Some(found) = attributes.iter_mut().find(|(other, _)| &**other == name) {
            let before = std::mem::replace(&mut found.1, value);
            drop(attributes);
            drop(before);
            return Ok(());
        }
        self.count_variable()?;
        attributes.push((name.into(), value));
        Ok(())
    }

    /// Runs a loop over `items`; `depth0` loops of its kind are around it.
    pub(super) fn repeat(
        &mut self,
        state: &'p For,
        items: &Value,
        depth0: usize,
        recursive: Option<(usize, ScopeId)>,
        out: &mut Writer,
    ) -> Result<Flow, Failure> {
        let mut items = operate::items(&self.meter, items)?;
        if let Some(test) = &state.test {
            items = self.passing(state, test, &items)?;
        }
        if items.is_empty() {
            return self.otherwise(state, out);
        }
        let around = Loop {
            items: Rc::clone(&items),
            index0: Cell::new(0),
            depth0,
            recursive,
            asked: RefCell::new(None),
        };
        let around = Value::object(&self.meter, Object::Loop(around))?;
        let mut ended = false;
        for (index, item) in items.iter().enumerate() {
            if let Value::Object(object) = &around
                && let Object::Loop(around) = &***object
            {
                around.index0.set(index);
            }
            let flow = self.scoped(self.current, |renderer| {
                if let Some(name) = renderer.program.loop_name {
                    renderer.store(name, around.clone())?;
                }
                renderer.assign(&state.target, item.clone())?;
                renderer.body(&state.body, out)
            })?;
            match flow {
                Flow::Next => ended = true,
                Flow::Break => break,
                Flow::Continue => {}
            }
        }
        if ended {
            return Ok(Flow::Next);
        }
        // Jinja2 takes a loop whose body never came to its end for one without items.
        self.otherwise(state, out)
    }

    /// What a loop writes that did nothing. Leaving a loop from here leaves the one around it.
    fn otherwise(&mut self, state: &'p For, out: &mut Writer) -> Result<Flow, Failure> {
        self.scoped(self.current, |renderer| renderer.body(&state.otherwise, out))
    }

    /// The items of which a loop's test is true.
    fn passing(
        &mut self,
        state: &'p For,
        test: &'p Expr,
        items: &Items,
    ) -> Result<Rc<Held<Items>>, Failure> {
        let mut passing = Vec::new();
        for item in items.iter() {
            let passes = self.scoped(self.current, |renderer| {
                renderer.assign(&state.target, item.clone())?;
                Ok(renderer.eval(test)?.is_true())
            })?;
            if passes {
                passing.push(item.clone());
            }
        }
        value::share_items(&self.meter, passing)
    }
}
